"""MoE layer, forward and forward + backward, against torch: `python -m benchmarks.bench_moe_layer [--full]`.

Quick mode takes a slice of each layer: fewer experts at true hidden x inter, and so many fewer tokens that every expert
has as many rows as in the whole layer with T tokens. `--full` takes all experts and all T.
Rates count 6 H I FLOPs per (token, expert) forward and 12 H I forward + backward; LoRA's own work is not counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from rich.table import Table

from benchmarks import contest, kt_kernel_opponent, problem, session
from benchmarks.contest import BASE_ONLY, FORMATS, MODELS, OURS, LayerBench, Model
from benchmarks.harness import CaseResult

SHORT = {"forward": "fwd", "forward + backward": "fwd + bwd"}
FULL_TOKENS, QUICK_TOKENS = (1, 16, 512, 2048), (16, 512)
OTHER_FORMATS = ("int8", "int4")


def run_model(
    model: Model,
    options: argparse.Namespace,
    running: session.Session,
    share: Callable[[], float],
    report: Callable[[CaseResult], None],
) -> None:
    """All token counts of one model; the weights live only as long as this call."""
    shape = model.full if options.full else model.slice
    layer = problem.make_layer(shape, options.lora_rank)
    bench = LayerBench(
        layer,
        running.roofline,
        max_pass_seconds=60.0 if options.full else 1.0,
        most=options.repeats,
        least=3 if options.full else 2,
    )
    formats = [OURS, *(one for one in FORMATS if one != OURS and _wanted(one, options.formats))]
    bench.add_ours(formats, ranks=(0,) if options.lora_rank else ())
    bench.add_torch(options.opponents)
    tokens_of = {t: t if options.full else model.slice_tokens(t) for t in options.tokens}
    with kt_kernel_opponent.joined(bench, options, running, max(tokens_of.values())):
        for tokens, scaled in tokens_of.items():
            batches = problem.make_batches(shape, scaled, contest.NUM_BATCHES)
            seconds = share()
            for backward in (False, True):
                budget = seconds * (2 if backward else 1) / 3
                names = list(bench.contestants)
                trial = bench.run(names, batches, tokens, backward=backward, budget=budget)
                report(trial.case(OURS, options.lora_rank))
    for name, reason in bench.missing.items():
        running.console.print(f"{name}: not measured: {reason}")


def _wanted(name: str, formats: list[str]) -> bool:
    return FORMATS[name][0] in formats


def summary_table(cases: list[CaseResult]) -> Table:
    """One row per case: our time and rates, and how many times longer each opponent takes in the same rounds."""
    first = cases[0]
    table = Table(
        title=f"{first.model}, {first.hidden} x {first.inter}, LoRA r = {first.lora_rank}", title_justify="left"
    )
    opponents = [one.name for one in first.contenders if one.name not in (OURS, BASE_ONLY)]
    columns = ("case", "rows", "ms", "GFLOP/s", "of FMA", "of DRAM")
    for column in (*columns, *opponents):
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=column == "case")
    for case in cases:
        by_name = {one.name: one for one in case.contenders}
        ours = by_name[OURS]
        table.add_row(
            f"T = {case.tokens_equivalent}  {SHORT[case.mode]}",
            f"{case.tokens * case.top_k}",
            f"{ours.median_ms:.1f}",
            f"{ours.gflops:.1f}",
            f"{ours.fma_fraction:.0%}",
            f"{ours.dram_fraction:.0%}",
            *(ratio_text(by_name[one]) for one in opponents),
        )
    return table


def ratio_text(one: object) -> str:
    """`2.31 x`, `> 9.8 x` for a bound, or `-`."""
    return "-" if one.ratio is None else f"{'> ' if one.is_bound else ''}{one.ratio:.2f} x"


def details_table(case: CaseResult) -> Table:
    """Every contender of one case."""
    title = (
        f"{case.model}, {case.mode}, T = {case.tokens_equivalent}: {case.tokens} tokens, top-{case.top_k} of "
        f"{case.num_experts} experts; probed {case.probe_fma_gflops:.0f} GFLOP/s, {case.probe_dram_gbs:.1f} GB/s"
    )
    table = Table(title=title, title_justify="left")
    columns = ("", "ms", "p20", "p80", "GFLOP/s", "of FMA", f"of {case.unit}", "of DRAM", "time / ours", "error", "n")
    for column in (*columns, "note"):
        table.add_column(column, justify="right" if column not in ("", "note") else "left")
    for one in case.contenders:
        if one.median_ms is None:
            table.add_row(one.name, *[""] * 7, ratio_text(one), "", "0", one.note)
            continue
        table.add_row(
            one.name,
            f"{one.median_ms:.1f}",
            f"{one.p20_ms:.1f}",
            f"{one.p80_ms:.1f}",
            f"{one.gflops:.1f}",
            f"{one.fma_fraction:.0%}",
            f"{one.unit_fraction:.0%}",
            f"{one.dram_fraction:.0%}",
            ratio_text(one),
            f"{one.error:.1e}",
            str(one.samples),
            one.note,
        )
    return table


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_moe_layer", description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="all experts (16 of DeepSeek-V3), T = 1, 16, 512, 2048")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=", ".join(MODELS)
    )
    parser.add_argument(
        "--formats", nargs="*", choices=OTHER_FORMATS, default=list(OTHER_FORMATS), help="of ours, beside bf16"
    )
    parser.add_argument(
        "--opponents",
        nargs="*",
        choices=problem.OPPONENTS,
        default=list(problem.OPPONENTS),
        metavar="NAME",
        help=", ".join(f'"{one}"' for one in problem.OPPONENTS),
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int, help="T of the whole layer (default: 16 512, with --full 1 16 512 2048)"
    )
    parser.add_argument("--lora-rank", type=int, default=contest.LORA_RANK, help="8 by default; 0: no LoRA")
    parser.add_argument("--repeats", type=int, default=20, help="most samples per contender (default 20)")
    parser.add_argument("--seconds", type=float, help="aim for this run time (default: 90, with --full 1800)")
    parser.add_argument("--details", action="store_true", help="also a table of every contender, case by case")
    session.add_options(parser)
    kt_kernel_opponent.add_options(parser)
    options = parser.parse_args(arguments)
    options.tokens = options.tokens or (FULL_TOKENS if options.full else QUICK_TOKENS)
    return options


def mode_of(options: argparse.Namespace) -> str:
    """`part` where models, token counts, formats or opponents are left out."""
    is_whole = (
        set(options.models) == set(MODELS)
        and set(options.tokens) >= set(FULL_TOKENS if options.full else QUICK_TOKENS)
        and set(options.formats) == set(OTHER_FORMATS)
        and set(options.opponents) == set(problem.OPPONENTS)
    )
    if not is_whole:
        return "part"
    return "full" if options.full else "quick"


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    running = session.open_session(options, "moe_layer", mode_of(options))
    deadline = running.start + (options.seconds or (1800 if options.full else 90))
    cases: list[CaseResult] = []
    planned = len(options.models) * len(options.tokens)

    def share() -> float:
        """Seconds for the next token count: an equal part of what is left, a third of it kept for checks and set-up."""
        return max(0.5, (deadline - time.monotonic()) / max(1, planned - len(cases) // 2) * 2 / 3)

    def report(case: CaseResult) -> None:
        cases.append(case)
        if options.details:
            running.console.print(details_table(case))

    for name in options.models:
        done = len(cases)
        run_model(MODELS[name], options, running, share, report)
        running.console.print(summary_table(cases[done:]))
    running.console.print(
        "rows: (token, expert) pairs; of FMA, of DRAM: of the probes beside each sample; "
        "columns right of these: time / time of kt_sft bf16"
    )
    running.save(cases)
    return 0


if __name__ == "__main__":
    sys.exit(session.run_command(main))
