"""What a call of the expert layer costs beside its products: `python -m benchmarks.bench_overhead`.

One token through the layer as a loaded model with an adapter calls it, and through each inner part alone, on layers
with the experts and slots of real ones but so narrow that the products take next to nothing. Parts are differences of
medians; all are timed in the same rounds, in several blocks of which the quietest one counts: microseconds triple
while a neighbour of a shared machine keeps the second core from the workers. The products at true size are timed beside
them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import peft
import torch
import transformers
from torch import Tensor

import kt_sft
from benchmarks import session
from kt_sft.autograd.moe import join, submit
from kt_sft.autograd.settings import NO_LORA, MoeSettings
from kt_sft.models.spec import ExpertsSpec
from kt_sft.nn.routed_experts import RoutedExperts

TARGET_US = 60.0
RANK = 8
ROUNDS = 3200
BLOCKS = 32
NARROW_HIDDEN, NARROW_INTER = 64, 32
# Part of the overhead -> the stage that has it and the next one, which has not.
PARTS = {
    "PEFT's wrappers": ("model", "experts"),
    "module call": ("experts", "forward"),
    "settings, LoRA operands": ("forward", "submit and join"),
    "dtypes, output, autograd": ("submit and join", "native"),
    "native: plan, routing, sum": ("native without rows", "native without tokens"),
    "native: arguments": ("native without tokens", ""),
}
PRODUCTS = ("native", "native without rows")
HEADINGS = ["layer", *PARTS, "overhead", "products at true size"]


@dataclass(frozen=True)
class Layer:
    """Experts and slots of a model's layer, and the true sizes of its products."""

    model: str
    num_experts: int
    top_k: int
    hidden: int
    inter: int


LAYERS = (Layer("demo model", 16, 8, 576, 192), Layer("Qwen3-30B-A3B", 128, 8, 2048, 768))


def adapted_experts(layer: Layer, method: str, folder: Path) -> torch.nn.Module:
    """The experts, PEFT's wrappers around them, of a one-layer model of narrow sizes that was saved and loaded."""
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=NARROW_HIDDEN,
        intermediate_size=NARROW_INTER,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=layer.num_experts,
        num_experts_per_tok=layer.top_k,
    )
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    model = kt_sft.load_model(folder, kt_sft.KTConfig(method=method), dtype=torch.bfloat16)
    lora = peft.LoraConfig(r=RANK, target_modules="all-linear")
    return kt_sft.get_peft_model(model, lora).eval().base_model.model.model.layers[0].mlp.experts


def stages(outer: torch.nn.Module, layer: Layer) -> dict[str, Callable[[], object]]:
    """The call as the model makes it, then each inner part alone."""
    experts = outer.get_base_layer() if hasattr(outer, "get_base_layer") else outer
    x, ids, weights = token(layer, experts.hidden_dim)
    settings = MoeSettings(rows=experts.rows())
    lora = NO_LORA if experts.lora is None else experts.lora.bind(experts.layer.inter)
    out = torch.empty_like(x)
    fixed = {
        **{"lora": lora.projections, "g": None, "u": None, "xa": None, "out_dtype": "bf16", "bias": None},
        **{"dropout_seed": 0, **settings.options},
    }
    skipped = torch.full_like(ids, layer.num_experts)
    nothing, no_out = (x[:0], ids[:0], weights[:0]), out[:0]
    return {
        "model": lambda: outer(x, ids, weights),
        "experts": lambda: experts(x, ids, weights),
        "forward": lambda: experts.forward(x, ids, weights),
        "submit and join": lambda: join(submit(x, ids, weights, experts.layer, settings, lora=lora)),
        "native": lambda: experts.layer.forward(x, ids, weights, out=out, **fixed),
        "native without rows": lambda: experts.layer.forward(x, skipped, weights, out=out, **fixed),
        "native without tokens": lambda: experts.layer.forward(*nothing, out=no_out, **fixed),
    }


def token(layer: Layer, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids and weights of one token."""
    x = torch.randn(1, hidden).to(torch.bfloat16)
    return x, torch.randperm(layer.num_experts)[None, : layer.top_k].contiguous(), torch.rand(1, layer.top_k)


def time_stages(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median microseconds of each in the quietest block, all in the same rounds."""
    blocks = [_time_block(calls, max(1, rounds // BLOCKS)) for _ in range(BLOCKS)]
    return min(blocks, key=lambda block: sum(block.values()))


def _time_block(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    times: dict[str, list[int]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter_ns()
            call()
            times[name].append(time.perf_counter_ns() - start)
    return {name: median(values[rounds // 10 :]) / 1e3 for name, values in times.items()}


def overhead_of(times: dict[str, float]) -> dict[str, float]:
    """Microseconds of each part, and `overhead`: the whole call without the products."""
    parts = {name: times[outer] - times.get(inner, 0.0) for name, (outer, inner) in PARTS.items()}
    return {**parts, "overhead": times["model"] - (times[PRODUCTS[0]] - times[PRODUCTS[1]])}


def products_us(layer: Layer, method: str, rounds: int) -> float:
    """Median of the native call at true size, as many experts as one token uses."""
    spec = ExpertsSpec(layer.top_k, layer.hidden, layer.inter)
    experts = RoutedExperts(spec, formats=method.lower()).eval()
    shapes = ((layer.inter, layer.hidden), (layer.inter, layer.hidden), (layer.hidden, layer.inter))
    for expert in range(layer.top_k):
        experts.load_expert(expert, *((torch.randn(shape) / shape[1] ** 0.5).to(torch.bfloat16) for shape in shapes))
    x, _, weights = token(layer, layer.hidden)
    ids = torch.randperm(layer.top_k)[None].contiguous()
    settings = MoeSettings(rows=experts.rows())
    return time_stages({"": lambda: join(submit(x, ids, weights, experts.layer, settings))}, rounds)[""]


def measure(layer: Layer, method: str, rounds: int) -> dict[str, object]:
    """One line of the table."""
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        outer = adapted_experts(layer, method, Path(folder))
        parts = overhead_of(time_stages(stages(outer, layer), rounds))
        true_size = products_us(layer, method, max(20, rounds // 8))
    return {"layer": f"{layer.model}, {method}", **parts, "products at true size": true_size}


def rows_of(cases: list[dict]) -> list[list[str]]:
    """Cells of the table, microseconds."""
    return [[case["layer"], *(f"{case[name]:.1f}" for name in HEADINGS[1:])] for case in cases]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_overhead", description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["BF16", "INT8"], choices=["BF16", "INT8", "INT4"])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"samples per part (default {ROUNDS})")
    session.add_options(parser)
    options = parser.parse_args(arguments)
    running = session.open_session(options, "overhead", "quick")
    cases = [measure(layer, method, options.rounds) for layer in LAYERS for method in options.methods]
    title = f"Microseconds of one token's call, LoRA r = {RANK}; target: overhead <= {TARGET_US:.0f}"
    running.show(title, HEADINGS, rows_of(cases))
    return running.finish(cases, misses(cases))


def misses(cases: list[dict]) -> list[str]:
    """Layers whose calls cost more than the target."""
    return [f"{one['layer']}: {one['overhead']:.0f} us" for one in cases if one["overhead"] > TARGET_US]


if __name__ == "__main__":
    sys.exit(session.run_command(main))
