"""Timing of one MoE layer: contestants checked, then run in shared rounds between probes of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from benchmarks import harness, problem
from benchmarks.gguf_mix import block_layers
from benchmarks.harness import CaseResult, Contender, Sample, Work
from benchmarks.kt_sft_contender import OurLayer
from benchmarks.problem import Batch, Computes, Layer, LayerShape
from benchmarks.roofline import Roofline, unit_of

OURS = "kt_sft bf16"
BASE_ONLY = "kt_sft bf16, base only"
REFERENCE = "torch loop fp32"  # the opponent of every speed claim
LORA_RANK = 8
NUM_BATCHES = 4
SETTLED_SECONDS = 0.3  # a pass this long needs no second warm-up
EXACT_REFERENCE_FLOPS = 4e9  # above this float64 would take longer than the timing; the fp32 loop serves instead
# Weight format and rows of our contestants; relative error (norm-wise, against the unquantised layer in float64).
FORMATS = {
    "kt_sft bf16": ("bf16", "bf16", 2e-2),
    "kt_sft int8": ("int8", "bf16", 4e-2),
    "kt_sft int4": ("int4", "bf16", 0.3),
    "kt_sft int8, bfp16 rows": ("int8", "bfp16", 4e-2),
    "kt_sft int4, bfp16 rows": ("int4", "bfp16", 0.3),
    "kt_sft int8, int8 rows": ("int8", "int8", 6e-2),
    "kt_sft int4, int8 rows": ("int4", "int8", 0.3),
}
MAX_ERROR = {"fp32": 1e-4, "bf16": 3e-2, "_int_mm": 6e-2}


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
    "deepseek-v3": _model("DeepSeek-V3, 16 experts", 7168, 2048, 16, top_k=8, sliced=(2, 1), full=16),
}


@dataclass(frozen=True)
class Contestant:
    computes: Computes
    layer: Layer  # whose answer is expected
    max_error: float
    weight_bytes: float = 2.0  # per weight that is read
    rows: str = "bf16"
    forward_only: bool = False

    @property
    def reports_seconds(self) -> bool:
        return hasattr(self.computes, "last_seconds")


@dataclass
class Trial:
    """Contestants of one layer, mode and number of tokens, timed in the same rounds."""

    shape: LayerShape
    mode: str
    tokens: int
    tokens_equivalent: int
    unit: str  # compute unit that was probed beside the FMA peak
    work: dict[str, Work] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    at_least: dict[str, float] = field(default_factory=dict)  # seconds of less work, of those too slow to time

    def fraction(self, name: str, which: str) -> float | None:
        return harness.fraction(which, self.work[name], self.samples[name]) if name in self.samples else None

    def ratio(self, name: str, ours: str = OURS) -> float | None:
        """Time of `name` / time of `ours`; a lower bound where `name` is in `at_least`."""
        mine = self.samples.get(ours)
        if not mine:
            return None
        if name in self.at_least:
            return self.at_least[name] / harness.quantile([one.seconds for one in mine], 0.5)
        return harness.time_ratio(self.samples.get(name, ()), mine)

    def case(self, ours: str, rank: int) -> CaseResult:
        """For the record and the tables; ratios are to `ours`."""
        limits = [one.limits for some in self.samples.values() for one in some]
        summaries = []
        for name, work in self.work.items():
            some = self.samples.get(name, [])
            summary = harness.summarise(name, some, work, self.samples.get(ours, []))
            summary.error, summary.note = self.errors.get(name), self.notes.get(name, "")
            if name in self.at_least:
                summary.ratio, summary.is_bound = self.ratio(name, ours), True
            if some and some[0].limits.unit_ops:
                summary.unit_fraction = harness.fraction("unit", work, some)
            summaries.append(summary)
        return CaseResult(
            model=self.shape.model,
            mode=self.mode,
            hidden=self.shape.hidden,
            inter=self.shape.inter,
            num_experts=self.shape.num_experts,
            top_k=self.shape.top_k,
            tokens=self.tokens,
            tokens_equivalent=self.tokens_equivalent,
            lora_rank=rank,
            work_gflop=self.work[ours].flops / 1e9,
            probe_fma_gflops=harness.quantile([one.fma_flops for one in limits], 0.5) / 1e9,
            probe_dram_gbs=harness.quantile([one.dram_bytes for one in limits], 0.5) / 1e9,
            unit=self.unit,
            contenders=summaries,
        )


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


def work_of(shape: LayerShape, batches: list[Batch], backward: bool, weight_bytes: float) -> Work:
    """FLOPs and weight bytes (each active expert once per direction) of one pass, mean over the batches."""
    passes = 2 if backward else 1
    active = sum(one.topk_ids.unique().numel() for one in batches) / len(batches)
    rows = batches[0].topk_ids.numel()
    bytes_read = passes * active * 3 * shape.hidden * shape.inter * weight_bytes
    return Work(passes * 6.0 * shape.hidden * shape.inter * rows, bytes_read)


class LayerBench:
    """One layer with all its contestants."""

    def __init__(
        self, layer: Layer, roofline: Roofline, *, max_pass_seconds: float, most: int = 20, least: int = 2
    ) -> None:
        self.layer, self.roofline = layer, roofline
        self.contestants: dict[str, Contestant] = {}
        self.missing: dict[str, str] = {}  # opponents that cannot run here, with the reason
        self._max_pass_seconds, self._most, self._least = max_pass_seconds, most, least
        self._rates = {dtype: matmul_rates(dtype) for dtype in (torch.float32, torch.bfloat16)}
        self._references: dict[tuple, list[torch.Tensor]] = {}

    def add_ours(self, names: Iterable[str], ranks: Iterable[int] = ()) -> None:
        """Our formats with the layer's LoRA; `ranks`: bf16 with these ranks as well, 0 without LoRA."""
        packed: dict[str, OurLayer] = {}
        for name in names:
            weight_format, rows, max_error = FORMATS[name]
            if weight_format in packed:
                ours = packed[weight_format].sharing(self.layer, rows=rows)
            else:
                ours = packed[weight_format] = OurLayer(self.layer, weight_format=weight_format, rows=rows)
            self.contestants[name] = Contestant(
                ours, self.layer, max_error, ours.weight_bytes, rows, forward_only=rows != "bf16"
            )
        for rank in ranks:
            layer = problem.with_rank(self.layer, rank)
            twin = packed["bf16"].sharing(layer)
            self.contestants[rank_name(rank)] = Contestant(twin, layer, FORMATS[OURS][2], twin.weight_bytes)

    def add_blocks(self, names: Iterable[str]) -> None:
        """Ours from block types of GGUF files, as `gguf_mix.DOWN` names them; each has weights of its own."""
        for name, blocks in block_layers(self.layer, names):
            ours = OurLayer(blocks.layer, weight_format=blocks.formats, experts=blocks.experts())
            self.contestants[name] = Contestant(ours, blocks.layer, FORMATS[OURS][2], ours.weight_bytes)

    def add_torch(self, names: Iterable[str]) -> None:
        for name, opponent in problem.torch_contenders(self.layer, names).items():
            label = name.rsplit(" ", 1)[1]
            self.contestants[name] = Contestant(opponent, self.layer, MAX_ERROR[label], forward_only=label == "_int_mm")

    def add(self, name: str, contestant: Contestant) -> None:
        self.contestants[name] = contestant

    def _expected_seconds(self, contestant: Contestant, work: Work, backward: bool) -> float:
        rates = self._rates.get(getattr(contestant.computes, "dtype", None))
        if rates is None or contestant.forward_only:
            return 0.0
        forward = work.flops / (2 if backward else 1) / rates[0]
        return forward + work.flops / 2 / rates[1] if backward else forward

    def _reference(self, layer: Layer, batch: Batch, backward: bool) -> list[torch.Tensor]:
        """Output (and gradients) in float64 while that is cheap, else by the fp32 loop; kept until the run ends."""
        key = (id(layer), id(batch), backward)
        if key not in self._references:
            flops = work_of(layer.shape, [batch], backward, 2.0).flops
            fp32 = self.contestants.get(REFERENCE)
            if flops <= EXACT_REFERENCE_FLOPS:
                reference: Computes = problem.exact_layer(layer)
            elif fp32 is not None and layer.gate_up is self.layer.gate_up:
                reference = fp32.computes.sharing(layer)
            else:
                reference = problem.torch_contenders(layer, [REFERENCE])[REFERENCE]
            answer = problem.answers(reference, batch) if backward else [problem.infer(reference, batch)]
            self._references[key] = answer
        return self._references[key]

    def check(self, name: str, batch: Batch, backward: bool) -> float:
        """Error of a contestant's answer; it also warms the contestant up.

        Raises:
            RuntimeError: the answer is wrong, so its speed means nothing.
        """
        one = self.contestants[name]
        reference = self._reference(one.layer, batch, backward)
        got = problem.answers(one.computes, batch) if backward else [problem.infer(one.computes, batch)]
        error = problem.worst_error(got, reference)
        if not error <= one.max_error:
            raise RuntimeError(
                f"{name}: relative error expected <= {one.max_error}, got {error:.3g} on "
                f"{self.layer.shape.model} with {batch.x.shape[0]} tokens; not timed, mend it first"
            )
        return error

    def run(
        self, names: Iterable[str], batches: list[Batch], tokens_equivalent: int, *, backward: bool, budget: float
    ) -> Trial:
        """Check and time the named contestants; `budget` is the time to aim for, in seconds."""
        names = [one for one in names if one in self.contestants]
        rows = "int8" if any(self.contestants[one].rows == "int8" for one in names) else "bf16"
        mode = "forward + backward" if backward else "forward"
        unit = unit_of(rows, self.roofline.isa)
        trial = Trial(self.layer.shape, mode, batches[0].x.shape[0], tokens_equivalent, unit)
        contenders = []
        for name in names:
            one = self.contestants[name]
            trial.work[name] = work = work_of(self.layer.shape, batches, backward, one.weight_bytes)
            if backward and one.forward_only:
                trial.notes[name] = "forward only"
                continue
            expected = self._expected_seconds(one, work, backward)
            if expected > self._max_pass_seconds:
                self._bound(trial, name, batches[0], backward, expected)
                continue
            trial.errors[name], estimate = self._warm_up(name, batches, backward)
            run = partial(_pass, problem.step if backward else problem.infer, one.computes, batches)
            contenders.append(Contender(name, run, estimate, one.reports_seconds))
        self._references.clear()
        estimates = [one.estimate_seconds for one in contenders]
        counts = harness.plan_samples(estimates, budget, most=self._most, least=self._least)
        probe = partial(self.roofline.probe, unit=unit)
        trial.samples = harness.run_interleaved(contenders, probe, counts, warmups=0)
        return trial

    def _warm_up(self, name: str, batches: list[Batch], backward: bool) -> tuple[float, float]:
        """Error of the contestant and seconds that one pass takes."""
        computes = self.contestants[name].computes
        call: Callable[..., object] = problem.step if backward else problem.infer
        start = time.perf_counter()
        error = self.check(name, batches[0], backward)
        estimate = time.perf_counter() - start
        if estimate < SETTLED_SECONDS or backward:
            start = time.perf_counter()
            call(computes, batches[1])
            estimate = time.perf_counter() - start
        return error, estimate

    def _bound(self, trial: Trial, name: str, batch: Batch, backward: bool, expected: float) -> None:
        """Time a contestant that is too slow with a part of the tokens: the whole takes longer still."""
        tokens = batch.x.shape[0]
        part = int(tokens * self._max_pass_seconds / expected)
        if part < 1:
            trial.notes[name] = f"not timed: one pass would take about {expected:.0f} s"
            return
        call: Callable[..., object] = problem.step if backward else problem.infer
        start = time.perf_counter()
        call(self.contestants[name].computes, batch.head(part))
        trial.at_least[name] = time.perf_counter() - start
        trial.notes[name] = f"too slow: timed with {part} of {tokens} tokens"


def rank_name(rank: int) -> str:
    """Name of our bf16 contestant with a LoRA of this rank."""
    return f"{OURS}, r = {rank}" if rank else BASE_ONLY


def _pass(call: Callable[..., object], computes: Computes, batches: list[Batch], index: int) -> object:
    call(computes, batches[index % len(batches)])
    return getattr(computes, "last_seconds", None)
