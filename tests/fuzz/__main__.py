"""`python -m tests.fuzz`: random damage to everything that is read from files and from clients.

Right answers and one-line errors of kt_sft (`KTError`) pass. Anything else is a fault: other exceptions, wrong
results, over 2 s of the processor, more memory than the files' size and 256 MiB, a crash, code that a file names.
Exit status: 0 without faults, 1 with faults.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from tests.fuzz.case import Case, put, write_good
from tests.fuzz.doors import DOORS
from tests.fuzz.runner import Tally, opened, run_in_child, scratch
from tests.fuzz.watch import FAILED, attempt, prepare


def main() -> int:
    options = _parse()
    if options.list:
        print("\n".join(f"{door.name}{'  (loads)' if door.loads else ''}" for door in DOORS.values()))
        return 0
    if options.case is not None:
        return _one(options)
    names = options.door or list(DOORS)
    tallies, last_said = [], time.monotonic()
    log = options.log.open("a", encoding="utf-8") if options.log else None

    def say(line: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} {line}"
        print(line, flush=True)
        if log is not None:
            print(line, file=log, flush=True)

    def progress(tally: Tally) -> None:
        nonlocal last_said
        if time.monotonic() - last_said > options.every:
            last_said = time.monotonic()
            say(f"... {tally.line()}")

    for name in names:
        count = options.loading if DOORS[name].loads else options.headers
        tally = run_in_child(name, options.seed, range(options.first, options.first + count), progress)
        tallies.append(tally)
        say(tally.line())
        for fault in tally.faults.values():
            say(f"    {fault.count} x {fault.detail} [{fault.place}]: {fault.command}")
    for kind, loads in (("index and header readers", False), ("loading doors", True)):
        mine = [tally for tally in tallies if DOORS[tally.door].loads == loads]
        if mine:
            cases, failed = sum(t.cases for t in mine), sum(t.failed for t in mine)
            slowest, grown = max(t.slowest_s for t in mine), max(t.grown_mib for t in mine)
            worst = f"slowest {slowest:.2f} s, memory grew {grown:.0f} MiB at most"
            say(f"{kind}: seed {options.seed}, {cases} cases at {len(mine)} doors, {failed} failed, {worst}")
    return int(any(tally.failed for tally in tallies))


def _one(options: argparse.Namespace) -> int:
    """One case, with its files kept where that is asked for."""
    kept = tuple(map(int, options.edits.split(","))) if options.edits else None
    (name,) = options.door
    prepare()
    with scratch() as place:
        subject, folder = opened(name, place)
        case = Case(options.seed, name, options.case, kept)
        if options.keep is not None:
            write_good(subject, options.keep)
            for file, content in case.damage(subject).items():
                put(options.keep / file, content)
        outcome = attempt(case, subject, folder)
    print(f"{outcome.kind} after {outcome.seconds:.3f} s: {outcome.detail} [{outcome.place}]", flush=True)
    os._exit(int(outcome.kind == FAILED))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--door", action="append", choices=sorted(DOORS), help="may be repeated; default: all")
    parser.add_argument("--headers", type=int, default=2000, help="cases of each index and header reader")
    parser.add_argument("--loading", type=int, default=200, help="cases of each loading door")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--log", type=Path, help="lines are added to it")
    parser.add_argument("--every", type=float, default=300.0, help="seconds between lines on a door under way")
    parser.add_argument("--case", type=int, help="one case of one door")
    parser.add_argument("--edits", help="of the case, by number: 0,2")
    parser.add_argument("--keep", type=Path, help="folder for the files of the case")
    parser.add_argument("--list", action="store_true", help="names of the doors")
    options = parser.parse_args()
    if options.case is not None and len(options.door or ()) != 1:
        parser.error("--case: name its door")
    return options


if __name__ == "__main__":
    sys.exit(main())
