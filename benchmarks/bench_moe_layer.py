"""MoE layer, forward and forward + backward, against torch: `python -m benchmarks.bench_moe_layer [--full]`.

Quick mode takes a slice of each layer: fewer experts at true hidden x inter, and so many fewer tokens that every expert
has as many rows as in the whole layer with T tokens. `--full` takes all experts (16 of DeepSeek-V3) and all T.
Rates count 6 H I FLOPs per (token, expert) forward and 12 H I forward + backward; LoRA's own work is not counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import harness, moe_layer
from benchmarks.harness import CaseResult, Contender, Work
from benchmarks.moe_layer import Batch, Layer, LayerShape
from benchmarks.roofline import Roofline, isas

OURS = "kt_sft bf16"
REFERENCE = "torch loop fp32"  # the opponent of every speed claim: always timed
NUM_BATCHES = 4
BUSY_CPUS = 0.3  # other work beyond which a run says that it is not to be trusted
SETTLED_SECONDS = 0.3  # a pass this long needs no second warm-up
LORA_RANK = 8
MAX_ERROR = {
    OURS: 2e-2,
    REFERENCE: 1e-4,
    "grouped_mm fp32": 1e-4,
    "torch loop bf16": 3e-2,
    "grouped_mm bf16": 3e-2,
}
EXACT_REFERENCE_FLOPS = 4e9  # above this float64 would take longer than the timing; the fp32 loop serves instead


@dataclass(frozen=True)
class Model:
    """`whole`: the layer that T refers to; `slice`: its quick form, `full`: what --full runs."""

    whole: LayerShape
    slice: LayerShape
    full: LayerShape

    def slice_tokens(self, tokens: int) -> int:
        """Tokens that give each expert of the slice the rows that it has in the whole layer with `tokens`."""
        rows_per_expert = tokens * self.whole.top_k / self.whole.num_experts
        return max(1, round(rows_per_expert * self.slice.num_experts / self.slice.top_k))


def _model(
    name: str, hidden: int, inter: int, experts: int, *, top_k: int, sliced: tuple[int, int], full: int
) -> Model:
    whole = LayerShape(name, hidden, inter, experts, top_k)
    return Model(whole, replace(whole, num_experts=sliced[0], top_k=sliced[1]), replace(whole, num_experts=full))


MODELS = {
    "deepseek-v2-lite": _model("DeepSeek-V2-Lite", 2048, 1408, 64, top_k=6, sliced=(8, 6), full=64),
    "qwen3-30b-a3b": _model("Qwen3-30B-A3B", 2048, 768, 128, top_k=8, sliced=(16, 8), full=128),
    "deepseek-v3": _model("DeepSeek-V3", 7168, 2048, 256, top_k=8, sliced=(4, 2), full=16),
}


@dataclass(frozen=True)
class Settings:
    full: bool
    tokens: tuple[int, ...]
    repeats: int
    max_pass_seconds: float  # slower contenders are named but not timed
    opponents: tuple[str, ...]


def matmul_rates(dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of torch in the two forms a frozen linear needs: x W^T, and dy W for the input gradient.

    bf16 on a CPU without bf16 instructions is up to 100 times slower in the second form than in fp32: this finds out
    in a tenth of a second what a trial of the layer would take half a minute for.
    """
    rows, size = 16, 1024
    x, weight = torch.randn(rows, size).to(dtype), torch.randn(size, size).to(dtype)
    rates = []
    for form in (weight.T, weight):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            x @ form
            times.append(time.perf_counter() - start)
        rates.append(2 * rows * size * size / min(times))
    return rates[0], rates[1]


def work_of(layer: Layer, batches: list[Batch], backward: bool) -> Work:
    """FLOPs and weight bytes (bf16, each active expert once per direction) of one pass, mean over the batches."""
    shape, passes = layer.shape, 2 if backward else 1
    active = sum(one.topk_ids.unique().numel() for one in batches) / len(batches)
    rows = batches[0].topk_ids.numel()
    return Work(passes * 6.0 * shape.hidden * shape.inter * rows, passes * active * shape.expert_bytes)


class Bench:
    """One layer with all its contenders, run over token counts and modes."""

    def __init__(self, layer: Layer, ours: moe_layer.OurLayer, roofline: Roofline, settings: Settings) -> None:
        self.layer, self.roofline, self.settings = layer, roofline, settings
        opponents = moe_layer.torch_contenders(layer)
        self._fp32_loop = opponents[REFERENCE]
        self.layers = {OURS: ours} | {name: opponents[name] for name in settings.opponents}
        self._rates = {dtype: matmul_rates(dtype) for dtype in (torch.float32, torch.bfloat16)}

    def _expected_seconds(self, name: str, work: Work, backward: bool) -> float:
        if name in (OURS, REFERENCE):
            return 0.0
        forward_rate, backward_rate = self._rates[self.layers[name].dtype]
        return work.flops / 2 / forward_rate + work.flops / 2 / backward_rate if backward else work.flops / forward_rate

    def _reference(self, batch: Batch, flops: float) -> list[torch.Tensor]:
        """Output and gradients in float64 while that is cheap, else by the fp32 loop."""
        exact = flops <= EXACT_REFERENCE_FLOPS
        return moe_layer.answers(moe_layer.exact_layer(self.layer) if exact else self._fp32_loop, batch)

    def check(self, name: str, batch: Batch, reference: list[torch.Tensor], backward: bool) -> float:
        """Error of a contender's answer; it also warms the contender up.

        Raises:
            RuntimeError: the answer is wrong, so its speed means nothing.
        """
        contender = self.layers[name]
        if backward:
            error = moe_layer.worst_error(moe_layer.answers(contender, batch), reference)
        else:
            error = moe_layer.worst_error([moe_layer.infer(contender, batch)], reference[:1])
        if not error <= MAX_ERROR[name]:
            raise RuntimeError(
                f"{name}: relative error expected <= {MAX_ERROR[name]}, got {error:.3g} on "
                f"{self.layer.shape.model} with {batch.x.shape[0]} tokens; not timed, mend it first"
            )
        return error

    def run_case(self, batches: list[Batch], tokens_equivalent: int, seconds: dict[bool, float]) -> list[CaseResult]:
        """Forward, then forward + backward, on the same batches; `seconds` is the time budget of each."""
        reference = self._reference(batches[0], work_of(self.layer, batches, True).flops)
        return [
            self._run_mode(batches, tokens_equivalent, reference, backward, seconds[backward])
            for backward in (False, True)
        ]

    def _run_mode(
        self, batches: list[Batch], tokens_equivalent: int, reference: list[torch.Tensor], backward: bool, budget: float
    ) -> CaseResult:
        work = work_of(self.layer, batches, backward)
        call: Callable[..., object] = moe_layer.step if backward else moe_layer.infer
        contenders, errors, notes = [], {}, {}
        for name, layer in self.layers.items():
            expected = self._expected_seconds(name, work, backward)
            if expected > self.settings.max_pass_seconds:
                notes[name] = f"not timed: one pass would take about {expected:.0f} s"
                continue
            start = time.perf_counter()
            errors[name] = self.check(name, batches[0], reference, backward)
            estimate = time.perf_counter() - start
            if estimate < SETTLED_SECONDS:
                start = time.perf_counter()
                call(layer, batches[1])
                estimate = time.perf_counter() - start
            run = partial(self._run_batch, call, layer, batches)
            contenders.append(Contender(name, run, estimate))
        counts = harness.plan_samples(
            [one.estimate_seconds for one in contenders],
            budget,
            most=self.settings.repeats,
            least=3 if self.settings.full else 2,
        )
        samples = harness.run_interleaved(contenders, self.roofline.probe, counts, warmups=0)
        return self._case(work, batches[0], tokens_equivalent, backward, samples, errors, notes)

    @staticmethod
    def _run_batch(call: Callable[..., object], layer: object, batches: list[Batch], index: int) -> object:
        return call(layer, batches[index % len(batches)])

    def _case(
        self,
        work: Work,
        batch: Batch,
        tokens_equivalent: int,
        backward: bool,
        samples: dict[str, list[harness.Sample]],
        errors: dict[str, float],
        notes: dict[str, str],
    ) -> CaseResult:
        shape, limits = self.layer.shape, [one.limits for some in samples.values() for one in some]
        summaries = []
        for name in self.layers:
            summary = harness.summarise(name, samples.get(name, []), work, samples[OURS])
            summary.error, summary.note = errors.get(name), notes.get(name, "")
            summaries.append(summary)
        return CaseResult(
            shape.model,
            "forward + backward" if backward else "forward",
            shape.hidden,
            shape.inter,
            shape.num_experts,
            shape.top_k,
            batch.x.shape[0],
            tokens_equivalent,
            LORA_RANK,
            work.flops / 1e9,
            harness.quantile([one.fma_flops for one in limits], 0.5) / 1e9,
            harness.quantile([one.dram_bytes for one in limits], 0.5) / 1e9,
            summaries,
        )


def run_model(
    model: Model,
    settings: Settings,
    roofline: Roofline,
    share: Callable[[], float],
    report: Callable[[CaseResult], None],
) -> None:
    """All token counts of one model; the weights live only as long as this call."""
    shape = model.full if settings.full else model.slice
    layer = moe_layer.make_layer(shape, LORA_RANK)
    bench = Bench(layer, moe_layer.OurLayer(layer, chunk_size=1024, cpu_activation="retain"), roofline, settings)
    for tokens in settings.tokens:
        batches = moe_layer.make_batches(shape, tokens if settings.full else model.slice_tokens(tokens), NUM_BATCHES)
        seconds = share()
        for case in bench.run_case(batches, tokens, {False: seconds / 3, True: seconds * 2 / 3}):
            report(case)


SHORT = {"forward": "fwd", "forward + backward": "fwd + bwd"}


def summary_table(cases: list[CaseResult]) -> Table:
    """One row per case: our time and rates, and how many times longer each opponent takes in the same rounds."""
    first = cases[0]
    table = Table(
        title=f"{first.model}, {first.hidden} x {first.inter}, LoRA r = {first.lora_rank}", title_justify="left"
    )
    opponents = [one.name for one in first.contenders if one.name != OURS]
    for column in (
        "case",
        "rows",
        "ms",
        "p20 - p80",
        "GFLOP/s",
        "of FMA",
        "of DRAM",
        *(f"vs {one}" for one in opponents),
    ):
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=column == "case")
    for case in cases:
        by_name = {one.name: one for one in case.contenders}
        ours = by_name[OURS]
        ratios = [f"{by_name[one].ratio:.2f} x" if by_name[one].ratio else "too slow" for one in opponents]
        table.add_row(
            f"T = {case.tokens_equivalent}  {SHORT[case.mode]}",
            f"{case.tokens * case.top_k}",
            f"{ours.median_ms:.1f}",
            f"{ours.p20_ms:.1f} - {ours.p80_ms:.1f}",
            f"{ours.gflops:.1f}",
            f"{ours.fma_fraction:.0%}",
            f"{ours.dram_fraction:.0%}",
            *ratios,
        )
    return table


def details_table(case: CaseResult) -> Table:
    """Every contender of one case."""
    title = (
        f"{case.model}, {case.mode}, T = {case.tokens_equivalent}: {case.tokens} tokens, top-{case.top_k} of "
        f"{case.num_experts} experts; probed {case.probe_fma_gflops:.0f} GFLOP/s, {case.probe_dram_gbs:.1f} GB/s"
    )
    table = Table(title=title, title_justify="left")
    for column in ("", "ms", "p20", "p80", "GFLOP/s", "of FMA", "of DRAM", "time / ours", "error", "samples"):
        table.add_column(column, justify="right" if column else "left")
    for one in case.contenders:
        if one.median_ms is None:
            table.add_row(one.name, "-", "", "", "", "", "", one.note, "", "0")
            continue
        ratio = f"{one.ratio:.2f} x" if one.ratio else ""
        table.add_row(
            one.name,
            f"{one.median_ms:.1f}",
            f"{one.p20_ms:.1f}",
            f"{one.p80_ms:.1f}",
            f"{one.gflops:.1f}",
            f"{one.fma_fraction:.0%}",
            f"{one.dram_fraction:.0%}",
            ratio,
            f"{one.error:.1e}",
            str(one.samples),
        )
    return table


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    opponents = [f"{name} {dtype}" for dtype in ("fp32", "bf16") for name in ("torch loop", "grouped_mm")]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_moe_layer", description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="all experts (16 of DeepSeek-V3), T = 1, 16, 512, 2048")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=", ".join(MODELS)
    )
    parser.add_argument(
        "--opponents",
        nargs="*",
        choices=opponents,
        default=opponents,
        metavar="NAME",
        help=", ".join(f'"{one}"' for one in opponents),
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int, help="T of the whole layer (default: 16 512, with --full 1 16 512 2048)"
    )
    parser.add_argument(
        "--isa", choices=("scalar", "avx2", "avx512"), help="narrow our kernels (default: the widest here)"
    )
    parser.add_argument("--threads", type=int, help="for kt_sft and torch alike (default: kt_sft's own choice)")
    parser.add_argument("--repeats", type=int, default=20, help="most samples per contender (default 20)")
    parser.add_argument("--seconds", type=float, help="aim for this run time (default: 40, with --full 900)")
    parser.add_argument("--details", action="store_true", help="also a table of every contender, case by case")
    parser.add_argument("--no-save", action="store_true", help="leave benchmarks/results as it is")
    return parser.parse_args(arguments)


def set_up_machine(options: argparse.Namespace) -> tuple[int, str, object]:
    """Same threads for kt_sft and torch, kernels narrowed as asked; returns threads, active ISA and the native module.

    Raises:
        ImportError: the native library is not built; the message says what to run.
    """
    from kt_sft.native import native

    library = native()
    threads = options.threads or library.default_threads()
    if options.isa:
        library.set_isa(options.isa)
    library.set_threads(threads, min(threads, len(library.cpu_info()["numa_nodes"]) or 1))
    torch.set_num_threads(threads)
    return threads, library.isa_active(), library


def main(arguments: list[str] | None = None) -> int:
    start = time.monotonic()
    options, console = parse_arguments(arguments), Console(width=160)
    try:
        threads, isa, library = set_up_machine(options)
    except (ImportError, ValueError) as fault:
        print(f"bench: {fault}", file=sys.stderr)
        return 1
    roofline = Roofline(isa if isa in isas() else isas()[-1], threads)
    tokens = tuple(options.tokens or ((1, 16, 512, 2048) if options.full else (16, 512)))
    deadline = start + (options.seconds or (900 if options.full else 40))
    settings = Settings(options.full, tokens, options.repeats, 60.0 if options.full else 1.0, tuple(options.opponents))
    machine = harness.machine_record(threads, isa, Path(library.__file__))
    limits = {f"{count}_threads": asdict(roofline.probe(count)) for count in sorted({1, threads})}
    console.print(
        f"{machine['cpu']}, {threads} threads, {isa} kernels, torch {machine['torch']} "
        f"({machine['torch_cpu_capability']}), {machine['cpus_busy_with_other_work']} CPUs busy with other work"
    )

    if float(str(machine["cpus_busy_with_other_work"])) > BUSY_CPUS:
        console.print(
            "[yellow]This machine is busy with other work: with several threads torch suffers from that far more "
            "than kt_sft does. Ratios count only when it is idle, or with --threads 1.[/yellow]"
        )
    cases: list[CaseResult] = []
    planned = len(options.models) * len(tokens)

    def share() -> float:
        """Seconds for the next token count: an equal part of what is left, a third of it kept for checks and set-up."""
        return max(0.5, (deadline - time.monotonic()) / max(1, planned - len(cases) // 2) * 2 / 3)

    def report(case: CaseResult) -> None:
        cases.append(case)
        if options.details:
            console.print(details_table(case))

    for name in options.models:
        done = len(cases)
        run_model(MODELS[name], settings, roofline, share, report)
        console.print(summary_table(cases[done:]))
    console.print("rows: (token, expert) pairs; of FMA, of DRAM: of the probes beside each sample; vs: time / our time")
    if not options.no_save:
        path = harness.save_results(machine, limits, cases, bench="moe_layer", mode="full" if options.full else "quick")
        console.print(f"saved to {path.relative_to(harness.ROOT)} in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
