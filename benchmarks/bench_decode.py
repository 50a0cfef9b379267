"""Decoding, 1 to 4 tokens through one MoE layer: `python -m benchmarks.bench_decode`.

Bytes of the active experts per second against the DRAM probe, per weight format, with the rows that inference takes on
this CPU; beside the torch fp32 loop, and kt-kernel if installed. The call itself is timed on a layer so small that
nothing but the call is left.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from statistics import median

import torch
from rich.table import Table

from benchmarks import contest, kt_kernel_opponent, problem, session
from benchmarks.bench_moe_layer import ratio_text
from benchmarks.contest import BASE_ONLY, MODELS, OURS, REFERENCE, LayerBench
from benchmarks.harness import CaseResult
from benchmarks.kt_sft_contender import OurLayer
from benchmarks.problem import LayerShape
from benchmarks.targets import inference_names

TOKENS = (1, 2, 4)
MAX_LAYER_BYTES = 300e6  # bf16; experts enough that 4 tokens mostly meet different ones
OVERHEAD_CALLS = 300


def decode_shape(whole: LayerShape, full: bool) -> LayerShape:
    """True sizes with as many experts as fit what a quick benchmark may pack; of large ones fewer are active, too."""
    if full:
        return whole
    fitting = max(2, int(MAX_LAYER_BYTES // whole.expert_bytes))
    experts = min(whole.num_experts, fitting)
    return replace(whole, num_experts=experts, top_k=min(whole.top_k, experts // 2))


def call_overhead_us(shape: LayerShape, rank: int) -> float:
    """Microseconds of one inference call of a layer that has next to no work, with as many experts and slots."""
    tiny = replace(shape, hidden=32, inter=32)
    ours = OurLayer(problem.make_layer(tiny, rank))
    (batch,) = problem.make_batches(tiny, 1, 1)
    times = []
    with torch.no_grad():
        for _ in range(OVERHEAD_CALLS):
            start = time.perf_counter()
            ours.forward(batch.x, batch.topk_ids, batch.topk_weights)
            times.append(time.perf_counter() - start)
    return median(times[OVERHEAD_CALLS // 10 :]) * 1e6


def run_model(key: str, options: argparse.Namespace, running: session.Session) -> list[CaseResult]:
    shape = decode_shape(MODELS[key].whole, options.full)
    layer = problem.make_layer(shape, contest.LORA_RANK)
    bench = LayerBench(layer, running.roofline, max_pass_seconds=5.0, most=options.repeats, least=3)
    bench.add_ours([OURS, *inference_names(running.library).values()], ranks=(0,))
    bench.add_torch([REFERENCE])
    cases = []
    with kt_kernel_opponent.joined(bench, options, running, max(TOKENS)):
        for tokens in TOKENS:
            batches = problem.make_batches(shape, tokens, contest.NUM_BATCHES)
            trial = bench.run(list(bench.contestants), batches, tokens, backward=False, budget=options.seconds_per_case)
            cases.append(trial.case(OURS, contest.LORA_RANK))
    for name, reason in bench.missing.items():
        running.console.print(f"{name}: not measured: {reason}")
    return cases


def table_of(cases: list[CaseResult], overhead_us: float) -> Table:
    first = cases[0]
    table = Table(
        title=f"{first.model}, top-{first.top_k} of {first.num_experts} experts, LoRA r = {first.lora_rank}; "
        f"a call without work takes {overhead_us:.0f} us",
        title_justify="left",
    )
    for column in ("", "T", "ms", "GB/s of weights", "of DRAM", f"time / {OURS}", "call / time", "error"):
        table.add_column(column, justify="left" if not column else "right")
    for case in cases:
        for one in case.contenders:
            if one.median_ms is None:
                continue
            is_ours = one.name.startswith("kt_sft") and one.name != BASE_ONLY
            table.add_row(
                one.name,
                str(case.tokens),
                f"{one.median_ms:.2f}",
                f"{one.dram_fraction * case.probe_dram_gbs:.1f}",
                f"{one.dram_fraction:.0%}",
                ratio_text(one),
                f"{overhead_us / 10 / one.median_ms:.1f} %" if is_ours else "",
                f"{one.error:.1e}",
            )
    return table


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_decode", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=", ".join(MODELS)
    )
    parser.add_argument("--full", action="store_true", help="all experts")
    parser.add_argument("--repeats", type=int, default=20, help="most samples per contender (default 20)")
    parser.add_argument("--seconds-per-case", type=float, default=4.0, help="time to aim for, without probes")
    session.add_options(parser)
    kt_kernel_opponent.add_options(parser)
    return parser.parse_args(arguments)


def mode_of(options: argparse.Namespace) -> str:
    """`part` where models are left out."""
    if set(options.models) != set(MODELS):
        return "part"
    return "full" if options.full else "quick"


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    running = session.open_session(options, "decode", mode_of(options))
    cases, overhead = [], {}
    for key in options.models:
        name = MODELS[key].whole.model
        shape = decode_shape(MODELS[key].whole, options.full)
        overhead[name] = round(call_overhead_us(shape, contest.LORA_RANK), 1)
        done = run_model(key, options, running)
        running.console.print(table_of(done, overhead[name]))
        cases += done
    running.save(cases, call_overhead_us=overhead)
    return 0


if __name__ == "__main__":
    sys.exit(session.run_command(main))
