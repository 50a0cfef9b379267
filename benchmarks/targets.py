"""Every speed and memory target of this project, measured: `python -m benchmarks.targets [--quick | --full] [--json]`.

Prints one line per demand with the figure of each model and pass, MISS or "not measurable" with the reason; exits 1 if
one is missed. Quick mode (under 5 minutes on 2 cores) takes slices of the layers as bench_moe_layer does. All threads;
every figure is a median of ratios within one run, each sample between two probes of the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field

from benchmarks import contest, demands, kt_kernel_opponent, memory, problem, products, session
from benchmarks.contest import BASE_ONLY, MODELS, OURS, REFERENCE, LayerBench, Model, Trial, rank_name
from benchmarks.demands import AVX2_FMA, AVX2_KT, BANDS, FORWARD, GROUPED, INFERENCE, KT, STEP, V3, W8A8, Figure
from benchmarks.gguf_mix import DOWN
from benchmarks.harness import time_ratio
from benchmarks.products import Kernel, MatrixShape, PackedMatrices, Product
from benchmarks.roofline import Roofline, unit_of

R64 = rank_name(64)
# T, backward, contestants; kt-kernel is timed beside the run without LoRA, since it has none.
TRIALS = (
    (1, False, (OURS, BASE_ONLY, INFERENCE["int8"], INFERENCE["int4"], REFERENCE, *KT.values())),
    (16, False, (OURS, BASE_ONLY, REFERENCE, KT["bf16"])),
    (512, False, (OURS, BASE_ONLY, R64, W8A8, REFERENCE, KT["bf16"], KT["int8"])),
    (2048, False, (OURS, BASE_ONLY, REFERENCE, KT["bf16"])),
    (16, True, (OURS, REFERENCE, GROUPED)),
    (512, True, (OURS, BASE_ONLY, R64, REFERENCE, GROUPED)),
    (2048, True, (OURS, "kt_sft int8", "kt_sft int4", *DOWN)),
)
QUICK_SECONDS, MIN_TRIAL_SECONDS, MAX_TRIAL_SECONDS, FULL_TRIAL_SECONDS = 270.0, 0.3, 4.0, 40.0
QUICK_ROWS = (1, 4, 8, 32, 64, 512)  # per expert, of the input gradient's bands


@dataclass
class Run:
    """The figures of all models, and what they are taken with."""

    running: session.Session
    options: argparse.Namespace
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    trials_left: int = 0

    def wants(self, *keys: str) -> bool:
        """Whether a selected line needs one of these figures."""
        return any(one.key in keys for one in selected(self.options))

    @property
    def most(self) -> int:
        return self.options.repeats or (20 if self.options.full else 10)

    @property
    def budget(self) -> float:
        """Seconds of the next trial; in quick mode less as the time runs out, of which checks take the other part."""
        if self.options.seconds_per_trial or self.options.full:
            return self.options.seconds_per_trial or FULL_TRIAL_SECONDS
        left = (QUICK_SECONDS - self.running.seconds) / max(1, self.trials_left)
        return min(MAX_TRIAL_SECONDS, max(MIN_TRIAL_SECONDS, 0.4 * left))


def selected(options: argparse.Namespace) -> list[demands.Demand]:
    return [one for one in demands.DEMANDS if options.only in one.line]


def inference_names(library: object) -> dict[str, str]:
    """Our contestants for int8 and int4 with the rows that inference takes on this CPU."""
    suffix = {"int8": ", int8 rows", "bfp16": ", bfp16 rows", "bf16": ""}
    return {INFERENCE[one]: f"kt_sft {one}{suffix[library.default_rows(one)]}" for one in ("int8", "int4")}


def trial_figures(trial: Trial, mode: str, tokens: int, aliases: dict[str, str], notes: dict[str, str]) -> dict:
    """Every figure that a trial gives, by key; those that it cannot give with the reason."""
    figures = {}
    names = list(trial.work) + list(aliases)
    for name in names:
        real = aliases.get(name, name)
        note = notes.get(real, "")
        for limit in ("dram", "fma", "unit"):
            figures[demands.share(mode, tokens, name, limit)] = Figure(trial.fraction(real, limit), note)
    for name in (*names, *notes):
        real = aliases.get(name, name)
        for ours in names:
            value = trial.ratio(real, aliases.get(ours, ours))
            reason = trial.notes.get(real, notes.get(real, "")) if value is None or real in trial.at_least else ""
            figures[demands.times(mode, tokens, name, ours)] = Figure(value, reason, real in trial.at_least)
    return figures


def run_layer(run: Run, key: str, model: Model) -> None:
    """All trials of one model."""
    options, running = run.options, run.running
    wanted = wanted_trials(options, key)
    if not wanted:
        return
    shape = model.full if options.full else model.slice
    layer = problem.make_layer(shape, contest.LORA_RANK)
    bench = LayerBench(layer, running.roofline, max_pass_seconds=20.0 if options.full else 1.5, most=run.most, least=3)
    aliases = inference_names(running.library)
    names = {aliases.get(one, one) for *_, some in wanted for one in some}
    bench.add_ours([one for one in contest.FORMATS if one in names or one == OURS], ranks=(0, 64))
    bench.add_blocks([one for one in DOWN if one in names])
    bench.add_torch([one for one in problem.OPPONENTS if one in names])
    notes = {W8A8: rows_note(running)}
    tokens_of = {t: _tokens(options, model, key, t) for t, *_ in wanted}
    with kt_kernel_opponent.joined(bench, options, running, max(tokens_of.values())):
        notes |= bench.missing
        for t, backward, some in wanted:
            batches = problem.make_batches(shape, tokens_of[t], contest.NUM_BATCHES)
            real = list(dict.fromkeys(aliases.get(one, one) for one in some))
            trial = bench.run(real, batches, t, backward=backward, budget=run.budget)
            mine = {alias: name for alias, name in aliases.items() if alias in some}
            found = trial_figures(trial, STEP if backward else FORWARD, t, mine, notes)
            run.figures[key] |= found
            run.trials_left -= 1
            running.console.print(f"{shape.model}: {trial.mode}, T = {t}, {running.seconds:.0f} s")


def wanted_trials(options: argparse.Namespace, key: str) -> list[tuple[int, bool, tuple[str, ...]]]:
    """The trials of a model that a selected line needs."""
    keys = [one.key for one in selected(options) if key in one.limits]
    return [
        (t, backward, names)
        for t, backward, names in TRIALS
        if any(one.startswith(f"{STEP if backward else FORWARD}, T = {t}:") for one in keys)
    ]


def _tokens(options: argparse.Namespace, model: Model, key: str, tokens: int) -> int:
    """Of the layer that runs. DeepSeek-V3 stops at 512: 256 rows per expert, where 2048 would only take longer."""
    tokens = min(tokens, 512) if key == V3 else tokens
    return tokens if options.full else model.slice_tokens(tokens)


def rows_note(running: session.Session) -> str:
    """Which row makes the int8 products where there is no int8 dot instruction, and what its share is of."""
    unit = unit_of("int8", running.isa)
    if unit in ("int8_vnni", "int8_amx"):
        return ""
    rows = [one for one in running.library.kernel_rows() if one["rows"] == "int8" and one["format"] == "int8"]
    names = [one["name"] for one in rows if one["selected"]] or ["none"]
    return f"no VNNI on this CPU: {names[0]}, of the peak of vpmaddwd"


def run_avx2(run: Run, key: str, model: Model) -> None:
    """Our AVX2 kernels on this CPU, and kt-kernel's."""
    running, library = run.running, run.running.library
    if "avx2" not in library.isa_detected() or not run.wants(AVX2_FMA, AVX2_KT):
        return
    library.set_isa("avx2")
    try:
        roofline = Roofline("avx2", running.threads)
        parts = [avx2_share(run, shape, roofline) for shape in products.shapes_of([key])]
        run.figures[key][AVX2_FMA] = Figure(min(parts))
        same = run.figures[key].get(demands.times(FORWARD, 512, KT["bf16"], BASE_ONLY))
        if running.isa == "avx2" and same is not None:  # the trial before has measured just that
            run.figures[key][AVX2_KT] = same
        else:
            run.figures[key][AVX2_KT] = avx2_against_kt_kernel(run, model, roofline)
    finally:
        library.set_isa(running.isa)


def avx2_against_kt_kernel(run: Run, model: Model, roofline: Roofline) -> Figure:
    """Forward at T = 512 without LoRA, both with AVX2."""
    bench = LayerBench(problem.make_layer(model.slice, 0), roofline, max_pass_seconds=5.0, most=run.most, least=3)
    bench.add_ours([OURS])
    tokens, opponent = model.slice_tokens(512), KT["bf16"]
    with kt_kernel_opponent.joined(bench, run.options, run.running, tokens, variant="avx2"):
        if opponent not in bench.contestants:
            return Figure(None, bench.missing[opponent])
        batches = problem.make_batches(model.slice, tokens, contest.NUM_BATCHES)
        return Figure(bench.run([OURS, opponent], batches, 512, backward=False, budget=run.budget).ratio(opponent))


def avx2_share(run: Run, shape: MatrixShape, roofline: Roofline) -> float:
    """Part of the FMA peak of the selected forward product with 512 rows."""
    product = Product(PackedMatrices(run.running.library, shape, "bf16"), _selected("forward", "bf16"), 512)
    product.check()
    (samples,) = products.time_products(
        [product], roofline, "fma_avx2", threads=run.running.threads, most=run.most, budget=run.budget / 4
    ).values()
    return contest.harness.fraction("unit", product.work, samples)


def _selected(op: str, weight_format: str) -> Kernel:
    return Kernel("", op, weight_format, "bf16", "", 0)


def run_gradients(run: Run, key: str) -> None:
    """Rate of the input gradient / rate of forward, from the same copy: the worst of gate and down in each band."""
    for weight_format in demands.MEMORY:
        bands = [one for one in BANDS if run.wants(demands.gradient_key(weight_format, one))]
        if not bands:
            continue
        ratios: dict[int, float] = {}
        for shape in products.shapes_of([key]):
            matrices = PackedMatrices(run.running.library, shape, weight_format)
            for m in (m for band in bands for m in band if run.options.full or m in QUICK_ROWS):
                ratios[m] = min(gradient_ratio(run, matrices, weight_format, m), ratios.get(m, float("inf")))
        for band in bands:
            worst = min((ratios[m], m) for m in band if m in ratios)
            run.figures[key][demands.gradient_key(weight_format, band)] = Figure(worst[0])
    run.running.console.print(f"{MODELS[key].whole.model}: input gradients, {run.running.seconds:.0f} s")


def gradient_ratio(run: Run, matrices: PackedMatrices, weight_format: str, m: int) -> float:
    running = run.running
    pair = [Product(matrices, _selected(op, weight_format), m) for op in ("forward", "input_grad")]
    for one in pair:
        one.check()
    unit = unit_of("bf16", running.isa)
    samples = products.time_products(
        pair, running.roofline, unit, threads=running.threads, most=run.most, budget=run.budget / 8
    )
    return time_ratio(samples[pair[0].kernel.label], samples[pair[1].kernel.label])


def run_memory(run: Run, key: str, model: Model) -> None:
    for one, figure_key in demands.MEMORY.items():
        if run.wants(figure_key):
            ratio = memory.packed_ratio(run.running.library, model.whole, one)
            run.figures[key][figure_key] = Figure(ratio)
    peaks = [one for one in selected(run.options) if one.key in demands.LOAD_PEAK.values() and key in one.limits]
    if peaks:
        ratios = memory.load_peak_ratios(model.slice)
        run.figures[key] |= {demands.LOAD_PEAK[one]: Figure(ratio) for one, ratio in ratios.items()}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__.split("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="slices of the layers: the default")
    size.add_argument("--full", action="store_true", help="all experts, more samples")
    parser.add_argument("--json", action="store_true", help="figures on standard output, the rest on standard error")
    parser.add_argument("--only", default="", metavar="TEXT", help="only lines that contain this")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=", ".join(MODELS)
    )
    parser.add_argument("--repeats", type=int, help="most samples per contender (default 10, with --full 20)")
    parser.add_argument("--seconds-per-trial", type=float, help="time to aim for (default: up to 4, with --full 40)")
    session.add_options(parser)
    kt_kernel_opponent.add_options(parser)
    return parser.parse_args(arguments)


def mode_of(options: argparse.Namespace) -> str:
    """`part` where lines or models are left out."""
    if options.only or set(options.models) != set(MODELS):
        return "part"
    return "full" if options.full else "quick"


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    running = session.open_session(options, "targets", mode_of(options), quiet=options.json)
    run = Run(running, options)
    run.trials_left = sum(len(wanted_trials(options, key)) for key in options.models)
    for key in options.models:
        model = MODELS[key]
        run.figures[key] = {}
        run_memory(run, key, model)
        run_gradients(run, key)
        run_layer(run, key, model)
        run_avx2(run, key, model)
    judged = [one for one in demands.judge(run.figures, selected(options)) if one.figures]
    running.console.print(demands.table_of(judged))
    running.console.print(f"{demands.summary(judged)}, {running.seconds:.0f} s")
    records = [one.record() for one in judged]
    running.save(records)
    if options.json:
        print(json.dumps(records, indent=1))
    return demands.exit_code(judged)


if __name__ == "__main__":
    sys.exit(session.run_command(main))
