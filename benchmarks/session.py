"""What every benchmark command shares: its options, the machine set-up, the probes and the record."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import harness
from benchmarks.roofline import ISAS, Roofline

BUSY_CPUS = 0.3  # other work beyond which a run says that it is not to be trusted


@dataclass
class Session:
    """One run of one benchmark command."""

    name: str
    mode: str
    console: Console
    library: ModuleType  # kt_sft's native library
    threads: int
    isa: str
    roofline: Roofline
    machine: dict[str, object]
    saves: bool
    start: float

    @property
    def seconds(self) -> float:
        """Since the start of the command."""
        return time.monotonic() - self.start

    def show(self, title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table whose first column is text, the others numbers."""
        table = Table(title=title, title_justify="left")
        for index, heading in enumerate(headings):
            table.add_column(heading, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def finish(self, cases: list, misses: Sequence[str]) -> int:
        """Say which targets are missed, save, and give the exit status."""
        for miss in misses:
            self.console.print(f"MISS {miss}")
        self.save(cases)
        return int(bool(misses))

    def save(self, cases: list, **more: object) -> Path | None:
        """Append the cases and every limit of this CPU to the results of today, unless told not to."""
        if not self.saves:
            return None
        counts = sorted({1, self.threads})
        limits = {f"{count}_threads": self.roofline.ceilings(count) for count in counts}
        path = harness.save_results(self.machine, limits, cases, bench=self.name, mode=self.mode, more=more)
        self.console.print(f"saved to {path.relative_to(harness.ROOT)} in {self.seconds:.0f} s")
        return path


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `open_session` reads."""
    parser.add_argument("--isa", choices=ISAS, help="narrow our kernels to this level (default: the widest here)")
    parser.add_argument("--threads", type=int, help="for kt_sft and torch alike (default: kt_sft's own choice)")
    parser.add_argument("--no-save", action="store_true", help="leave benchmarks/results as it is")


def open_session(options: argparse.Namespace, name: str, mode: str, *, quiet: bool = False) -> Session:
    """Same threads for kt_sft and torch, kernels narrowed as asked; says what the machine is and whether it is busy.

    Raises:
        ImportError: the native library is not built; the message says what to run.
        ValueError: the CPU lacks the level that was asked for.
    """
    from kt_sft.native import native

    start = time.monotonic()
    library = native()
    threads = options.threads or library.default_threads()
    if options.isa:
        library.set_isa(options.isa)
    library.set_threads(threads)
    torch.set_num_threads(threads)
    isa = library.isa_active()
    console = Console(width=160, file=sys.stderr if quiet else sys.stdout)
    machine = harness.machine_record(threads, isa, Path(library.__file__))
    console.print(
        f"{machine['cpu']}, {threads} threads, {isa} kernels, torch {machine['torch']} "
        f"({machine['torch_cpu_capability']}), {machine['cpus_busy_with_other_work']} CPUs busy with other work"
    )
    if float(str(machine["cpus_busy_with_other_work"])) > BUSY_CPUS:
        console.print(
            "[yellow]This machine is busy with other work: with several threads torch suffers from that far more "
            "than kt_sft does. Ratios count only when it is idle, or with --threads 1.[/yellow]"
        )
    roofline = Roofline(isa, threads)
    return Session(name, mode, console, library, threads, isa, roofline, machine, not options.no_save, start)


def run_command(main: object, arguments: list[str] | None = None) -> int:
    """Call a benchmark's main; a library that is not built or a wrong option is one line, not a traceback."""
    try:
        return main(arguments)
    except (ImportError, ValueError) as fault:
        print(f"bench: {fault}", file=sys.stderr)
        return 1
