"""Many cases of a door: in this process, or in a child that may crash or hang without harm."""

from __future__ import annotations

import json
import mmap
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.fuzz.case import Case, Subject, write_good
from tests.fuzz.doors import DOORS
from tests.fuzz.watch import FAILED, REFUSED, RIGHT, Hang, Outcome, attempt, prepare

SILENCE_S = 60.0  # of the clock on one case, after which its process is killed: it waits for something
_REPORT_S = 2.0
_START_S = 600.0
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Fault:
    """Cases that fail alike: the first of them, with no more edits than it needs, and how many there are."""

    command: str
    detail: str
    place: str
    count: int = 1


@dataclass
class Tally:
    """Of the cases of one door."""

    door: str
    seed: int
    cases: int = 0
    right: int = 0
    refused: int = 0
    failed: int = 0
    slowest_s: float = 0.0
    slow_once: int = 0
    seconds: float = 0.0
    grown_mib: float = 0.0
    faults: dict[str, Fault] = field(default_factory=dict)

    def add(self, case: Case, outcome: Outcome) -> None:
        self.cases += 1
        self.slowest_s = max(self.slowest_s, outcome.seconds)
        if outcome.kind != FAILED:
            self.right += outcome.kind == RIGHT
            self.refused += outcome.kind == REFUSED
            return
        self.failed += 1
        known = self.faults.get(outcome.place)
        if known is None:
            self.faults[outcome.place] = Fault(case.command, outcome.detail, outcome.place)
        else:
            known.count += 1

    def line(self) -> str:
        """One line for a log."""
        rate = self.cases / self.seconds if self.seconds else 0.0
        return (
            f"{self.door}: seed {self.seed}, {self.cases} cases, {self.right} right, {self.refused} refused, "
            f"{self.failed} failed ({len(self.faults)} faults), {rate:.0f}/s, slowest {self.slowest_s:.2f} s, "
            f"memory grew {self.grown_mib:.0f} MiB"
        )


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory, where there is one: a case writes files and removes them."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="kt_sft-fuzz-", dir=memory if os.access(memory, os.W_OK) else None
    ) as place:
        yield Path(place)


def opened(door: str, place: Path) -> tuple[Subject, Path]:
    """The subject of a door and the folder with its good files, which are read once."""
    made, folder = place / "made", place / "files"
    made.mkdir()
    folder.mkdir()
    subject = DOORS[door].build(made)
    write_good(subject, folder)
    subject.check(folder, subject.read(folder))  # and what is imported or cached once is not counted below
    return subject, folder


def run(
    door: str, seed: int, numbers: range, *, begin: Callable[[int], None] = lambda n: None,
    report: Callable[[Tally], None] = lambda tally: None,
) -> Tally:  # fmt: skip
    """These cases of a door, in this process."""
    tally = Tally(door, seed)
    with scratch() as place:
        subject, folder = opened(door, place)
        start, said, before = time.monotonic(), time.monotonic(), None
        for number in numbers:
            begin(number)
            case = Case(seed, door, number)
            outcome = attempt(case, subject, folder)
            if outcome.kind == FAILED and outcome.place not in tally.faults:
                case, outcome = _smallest(case, outcome, subject, folder)
                if outcome.kind != FAILED:
                    tally.slow_once += 1
            tally.add(case, outcome)
            if tally.cases == 1000:
                before = _resident()
            if (now := time.monotonic()) - said > _REPORT_S:
                said = now
                tally.seconds, tally.grown_mib = now - start, (_resident() - (before or _resident())) / 2**20
                report(tally)
        tally.seconds, tally.grown_mib = time.monotonic() - start, (_resident() - (before or _resident())) / 2**20
    return tally


def _smallest(case: Case, outcome: Outcome, subject: Subject, folder: Path) -> tuple[Case, Outcome]:
    """The same fault by fewer edits. Time that another process took is no fault: what took long is tried again."""
    if outcome.place.startswith(Hang.__name__):
        outcome = attempt(case, subject, folder)
    if outcome.kind != FAILED:
        return case, outcome
    for kept in [(index,) for index in range(case.edits())] if case.edits() > 1 else []:
        smaller = replace(case, kept=kept)
        if (found := attempt(smaller, subject, folder)).kind == FAILED and found.place == outcome.place:
            return smaller, found
    return case, outcome


def _resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * _PAGE


def run_in_child(door: str, seed: int, numbers: range, say: Callable[[Tally], None] = lambda tally: None) -> Tally:
    """The same in processes of their own: one that dies or is silent is a fault, and another one goes on behind it."""
    total = Tally(door, seed)
    at = numbers.start
    while at < numbers.stop:
        before = total
        tally, crashed_at, why = _child(door, seed, range(at, numbers.stop), lambda part, b=before: say(_sum(b, part)))
        total = _sum(total, tally)
        if crashed_at is None:
            break
        total.add(Case(seed, door, crashed_at), Outcome(FAILED, why, why))
        at = crashed_at + 1
    return total


def _child(door: str, seed: int, numbers: range, say: Callable[[Tally], None]) -> tuple[Tally, int | None, str]:
    """(what it counted, the case at which it died, how); the pulse is a file in which the child writes its number."""
    with tempfile.NamedTemporaryFile() as pulse, tempfile.TemporaryFile() as errors:
        pulse.write(struct.pack("<q", -1))
        pulse.flush()
        words = [sys.executable, "-m", "tests.fuzz.child", door, str(seed), str(numbers.start), str(numbers.stop)]
        environment = {**os.environ, "MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        child = subprocess.Popen(
            [*words, pulse.name], stdout=subprocess.PIPE, stderr=errors, cwd=root, env=environment
        )  # fmt: skip
        tally, seen, since, is_killed = Tally(door, seed), -1, time.monotonic(), False
        assert child.stdout is not None
        while True:
            ready, _, _ = select.select([child.stdout], [], [], 1.0)
            if ready:
                line = child.stdout.readline()
                if not line:
                    break
                tally = _loaded(json.loads(line))
                say(tally)
            pulse.seek(0)
            number, now = struct.unpack("<q", pulse.read(8))[0], time.monotonic()
            if number != seen:
                seen, since = number, now
            elif now - since > (SILENCE_S if number >= 0 else _START_S) and not is_killed:
                is_killed = True
                child.kill()
        status = child.wait()
        pulse.seek(0)
        seen = struct.unpack("<q", pulse.read(8))[0]
        errors.seek(0)
        last = (errors.read().decode("utf-8", "replace").strip().splitlines() or [""])[-1][:300]
    if status == 0:
        return tally, None, ""
    if status == 1 or seen < 0:
        raise RuntimeError(f"the fuzzer itself failed at case {seen} of seed {seed}, door {door}: {last}")
    how = f"no answer within {SILENCE_S:g} s" if is_killed else f"the interpreter ended with status {status}: {last}"
    # What it did since its last line is lost with it; the cases count nevertheless.
    return replace(tally, cases=max(seen - numbers.start, 0), faults=dict(tally.faults)), seen, how


def child_main(door: str, seed: int, numbers: range, pulse: Path) -> None:
    """The child's side."""
    prepare()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def report(tally: Tally) -> None:
        out.write(json.dumps(asdict(tally)) + "\n")
        out.flush()

    with pulse.open("r+b") as stream, mmap.mmap(stream.fileno(), 8) as memory:
        report(run(door, seed, numbers, begin=lambda n: struct.pack_into("<q", memory, 0, n), report=report))
    out.close()
    os._exit(0)  # threads of servers and kernels need not be waited for


def _loaded(values: dict[str, Any]) -> Tally:
    faults = {place: Fault(**fault) for place, fault in values.pop("faults").items()}
    return Tally(**values, faults=faults)


def _sum(one: Tally, other: Tally) -> Tally:
    faults = {place: replace(fault) for place, fault in one.faults.items()}
    for place, fault in other.faults.items():
        if place in faults:
            faults[place].count += fault.count
        else:
            faults[place] = fault
    counts = {
        name: getattr(one, name) + getattr(other, name)
        for name in ("cases", "right", "refused", "failed", "slow_once", "seconds")
    }
    slowest, grown = max(one.slowest_s, other.slowest_s), max(one.grown_mib, other.grown_mib)
    return Tally(one.door, one.seed, **counts, slowest_s=slowest, grown_mib=grown, faults=faults)
