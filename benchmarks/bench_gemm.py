"""One product per kernel row with cold weights: `python -m benchmarks.bench_gemm [--full] [--plot]`.

Quick mode times the gate projection of DeepSeek-V2-Lite, `--full` gate and down of all three models. Every row of the
kernel table that this CPU can run, each with 1 to 512 rows per expert, with one thread and with all.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from rich.table import Table

from benchmarks import session
from benchmarks.contest import MODELS
from benchmarks.products import (
    ROWS_PER_EXPERT,
    GemmCase,
    Kernel,
    MatrixShape,
    PackedMatrices,
    available_kernels,
    run_shape,
    shapes_of,
)
from benchmarks.report import product_cell

QUICK_MODELS = ("deepseek-v2-lite",)


def run_matrix(
    shape: MatrixShape, kernels: list[Kernel], options: argparse.Namespace, running: session.Session
) -> list[GemmCase]:
    matrices = {one: PackedMatrices(running.library, shape, one) for one in dict.fromkeys(k.format for k in kernels)}
    cases = []
    for threads in sorted({1, running.threads}):
        running.library.set_threads(threads)
        for m in options.rows:
            cases += run_shape(
                matrices,
                kernels,
                running.roofline,
                m,
                threads=threads,
                most=options.repeats,
                budget=options.seconds_per_kernel,
            )
    running.library.set_threads(running.threads)
    return cases


def table_of(cases: list[GemmCase]) -> Table:
    """One row per kernel: its part of its compute unit's peak (of DRAM where that is the larger) by rows per expert."""
    first = cases[0]
    counts = list(dict.fromkeys(one.m for one in cases))
    table = Table(
        title=f"{first.model} {first.projection}, n = {first.n}, k = {first.k}, {first.threads} threads: "
        "% of the compute unit's peak, or D: % of DRAM bandwidth where that is more",
        title_justify="left",
    )
    table.add_column("kernel", no_wrap=True)
    table.add_column("unit")
    for m in counts:
        table.add_column(f"m = {m}", justify="right")
    for kernel in dict.fromkeys(one.kernel for one in cases):
        mine = {one.m: one for one in cases if one.kernel == kernel}
        cells = (product_cell(asdict(mine[m])) if m in mine else "" for m in counts)
        table.add_row(kernel, next(iter(mine.values())).unit, *cells)
    return table


def ratio_table(cases: list[GemmCase]) -> Table:
    """Rate of each input gradient over that of the fastest forward row of its format and level."""
    counts = list(dict.fromkeys(one.m for one in cases))
    table = Table(
        title="input gradient: rate / rate of the fastest forward row of its format and level", title_justify="left"
    )
    table.add_column("kernel", no_wrap=True)
    for m in counts:
        table.add_column(f"m = {m}", justify="right")
    for kernel in dict.fromkeys(one.kernel for one in cases if one.ratio_to_forward is not None):
        mine = {one.m: one.ratio_to_forward for one in cases if one.kernel == kernel}
        table.add_row(kernel, *(f"{mine[m]:.0%}" if mine.get(m) else "" for m in counts))
    return table


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_gemm", description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="gate and down of all models")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS_PER_EXPERT), help="rows per expert")
    parser.add_argument("--kernels", default="", metavar="TEXT", help="only rows whose name contains this")
    parser.add_argument("--scalar", action="store_true", help="the scalar reference rows as well: slow")
    parser.add_argument("--repeats", type=int, default=20, help="most samples per kernel (default 20)")
    parser.add_argument("--seconds-per-kernel", type=float, default=0.15, help="time to aim for, without probes")
    parser.add_argument("--plot", action="store_true", help="also draw the roofline picture beside the results")
    session.add_options(parser)
    options = parser.parse_args(arguments)
    options.models = options.models or (list(MODELS) if options.full else list(QUICK_MODELS))
    return options


def mode_of(options: argparse.Namespace) -> str:
    """`part` where models, kernels or rows per expert are left out."""
    models = MODELS if options.full else QUICK_MODELS
    if options.kernels or not (set(options.models) >= set(models) and set(options.rows) >= set(ROWS_PER_EXPERT)):
        return "part"
    return "full" if options.full else "quick"


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    running = session.open_session(options, "gemm", mode_of(options))
    kernels = [one for one in available_kernels(running.library, scalar=options.scalar) if options.kernels in one.name]
    cases: list[GemmCase] = []
    shapes = shapes_of(options.models)
    for shape in shapes if options.full else shapes[::2]:
        done = run_matrix(shape, kernels, options, running)
        for threads in dict.fromkeys(one.threads for one in done):
            running.console.print(table_of([one for one in done if one.threads == threads]))
        running.console.print(ratio_table([one for one in done if one.threads == running.threads]))
        cases += done
    path = running.save(cases)
    if options.plot:
        from benchmarks import plot

        picture = plot.draw(cases, running.machine, path)
        running.console.print(f"picture: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(session.run_command(main))
