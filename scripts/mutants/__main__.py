"""`make mutants`: plants one fault at a time in a copy of the tree and runs the tests that have to see it.

Faults are small edits, listed in the files beside this one. The checkout is never changed. Exit status: 0 if every
fault is seen (or has a stated reason), 1 if one survives, 2 if the list is stale or a test fails without any fault.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scripts.mutants import (
    adapter_faults,
    config_faults,
    file_faults,
    form_faults,
    life_faults,
    native_faults,
    training_faults,
    write_faults,
)
from scripts.mutants.fault import Fault

ROOT = Path(__file__).resolve().parents[2]
FAULTS: tuple[Fault, ...] = (
    *adapter_faults.FAULTS,
    *form_faults.FAULTS,
    *training_faults.FAULTS,
    *life_faults.FAULTS,
    *file_faults.FAULTS,
    *write_faults.FAULTS,
    *config_faults.FAULTS,
    *native_faults.FAULTS,
)
TIMEOUT_S = 900  # a fault that makes a test hang is seen
KILLED, SURVIVED, STALE, BROKEN = "killed", "SURVIVED", "STALE", "BROKEN"
_COLORS = {KILLED: "green", SURVIVED: "red", STALE: "yellow", BROKEN: "yellow"}


@dataclass(frozen=True)
class Outcome:
    """What became of one fault; `detail` is the test that saw it, or what is wrong."""

    fault: Fault
    status: str
    detail: str
    seconds: float = 0.0


def main() -> int:
    options = parse()
    console = Console()
    chosen = [fault for fault in FAULTS if wanted(fault, options)]
    stale = [Outcome(fault, STALE, why) for fault in chosen if (why := fault.stale(ROOT))]
    if options.list:
        console.print(table([Outcome(f, "", f.file) for f in chosen if f not in {o.fault for o in stale}] + stale))
        return 2 if stale else 0
    usable = [fault for fault in chosen if fault not in {outcome.fault for outcome in stale}]
    with tempfile.TemporaryDirectory(prefix="kt_sft-mutants-") as folder:
        outcomes = stale + run_all(usable, Path(folder), options, console)
    shown = outcomes if len(outcomes) <= 5 else [o for o in outcomes if o.status != KILLED]
    console.print(table(shown))
    counts = {status: sum(o.status == status for o in outcomes) for status in _COLORS}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()) + f" of {len(outcomes)}")
    if counts[STALE] or counts[BROKEN]:
        return 2
    return 1 if any(o.status == SURVIVED and not o.fault.reason for o in outcomes) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", help="regular expression for name or file; may be repeated")
    parser.add_argument("--list", action="store_true", help="show the faults and whether they are stale; run nothing")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="faults at a time")
    parser.add_argument("--python-only", action="store_true", help="leave out what needs a build of the library")
    parser.add_argument("--no-check", action="store_true", help="do not run the tests without faults first")
    return parser.parse_args()


def wanted(fault: Fault, options: argparse.Namespace) -> bool:
    if options.python_only and fault.is_native:
        return False
    text = f"{fault.name} {fault.file}"
    return options.only is None or any(re.search(pattern, text) for pattern in options.only)


class Tree:
    """A copy of the checkout, and a server that runs tests in it."""

    def __init__(self, path: Path):
        self.path = copy_tree(path)
        command = [sys.executable, "-m", "scripts.mutants.server"]
        self._server = subprocess.Popen(
            command, cwd=path, env=environment(path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def test(self, tests: Iterable[str], *words: str) -> tuple[int | None, str]:
        """Exit status of pytest, None after a time-out, and its output."""
        assert self._server.stdin is not None and self._server.stdout is not None
        command = ["-q", "-p", "no:cacheprovider", "-rfE", "--tb=no", *words, *tests]
        self._server.stdin.write(json.dumps({"words": command, "timeout_s": TIMEOUT_S}) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return answer["status"], answer["output"]

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


def run_all(faults: list[Fault], folder: Path, options: argparse.Namespace, console: Console) -> list[Outcome]:
    """Every fault in one of several copies of the tree; those of the library come last, one after another."""
    made = [Tree(folder / f"tree-{number}") for number in range(max(1, options.jobs))]
    trees: queue.Queue[Tree] = queue.Queue()
    for tree in made:
        trees.put(tree)
    failing = set() if options.no_check else check_clean(faults, trees, len(made))
    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        color = _COLORS[outcome.status]
        console.print(
            f"[{color}]{outcome.status:>8}[/] {outcome.seconds:4.0f} s  {escape(outcome.fault.name)}"
            f"  [dim]{escape(outcome.detail)}[/]",
            highlight=False,
            soft_wrap=True,
        )

    def one(fault: Fault) -> Outcome:
        if bad := [test for test in fault.tests if any(is_of(found, test) for found in failing)]:
            return Outcome(fault, BROKEN, f"fails without the fault: {bad[0]}")
        tree = trees.get()
        try:
            return plant_and_run(fault, tree)
        finally:
            trees.put(tree)

    with concurrent.futures.ThreadPoolExecutor(len(made)) as pool:
        for future in concurrent.futures.as_completed(
            [pool.submit(one, fault) for fault in faults if not fault.is_native]
        ):
            report(future.result())
    while trees.qsize() > 1:  # one build is enough
        trees.get().close()
    for number, fault in enumerate(fault for fault in faults if fault.is_native):
        if number == 0:
            build(trees.queue[0].path)
        report(one(fault))
    trees.get().close()
    return outcomes


def copy_tree(target: Path) -> Path:
    """The files of the checkout that git knows or would add, and the built library."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    libraries = [str(path.relative_to(ROOT)) for path in ROOT.glob("kt_sft/_native*.so")]
    if not libraries:
        sys.exit("mutants: the native library is not built; run make setup")
    for name in [*filter(None, listed), *libraries]:
        source = ROOT / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    return target


def environment(tree: Path) -> dict[str, str]:
    """Offline, one thread, this tree; without .pyc files, which may outlive a change of the same second."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("KT_SFT_")}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return env | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}


def check_clean(faults: list[Fault], trees: queue.Queue[Tree], jobs: int) -> set[str]:
    """Tests of the list that fail without any fault: they would see everything. In `jobs` parts, whole files each."""
    by_file: dict[str, list[str]] = {}
    for test in sorted({test for fault in faults for test in fault.tests}):
        by_file.setdefault(test.partition("::")[0], []).append(test)
    parts = [[test for file in list(by_file)[start::jobs] for test in by_file[file]] for start in range(jobs)]

    def run(tests: list[str]) -> set[str]:
        if not tests:
            return set()
        tree = trees.get()
        try:
            status, output = tree.test(tests)
        finally:
            trees.put(tree)
        if status not in (0, 1):
            sys.stderr.write(f"mutants: pytest ends with status {status}\n{output[-4000:]}")
            raise SystemExit(2)
        return set(seen_by(output))

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return set().union(*pool.map(run, parts))


def seen_by(output: str) -> list[str]:
    """Node ids of the tests that failed."""
    return re.findall(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", output, re.MULTILINE)


def is_of(node: str, test: str) -> bool:
    """Whether a node id is that of a test, or of one of its cases."""
    return node == test or node.startswith((f"{test}[", f"{test}::"))


def plant_and_run(fault: Fault, tree: Tree) -> Outcome:
    path = tree.path / fault.file
    whole = path.read_text(encoding="utf-8")
    began = time.monotonic()
    path.write_text(fault.planted(whole), encoding="utf-8")
    try:
        if fault.is_native and (failed := build(tree.path, check=False)):
            return Outcome(fault, BROKEN, f"does not compile: {failed}", time.monotonic() - began)
        status, output = tree.test(fault.tests, "-x")
    finally:
        path.write_text(whole, encoding="utf-8")
    seconds = time.monotonic() - began
    if status is None:
        return Outcome(fault, KILLED, f"a test took more than {TIMEOUT_S} s", seconds)
    if status == 0:
        return Outcome(fault, SURVIVED, fault.reason or f"{fault.file}: {fault.old[:60]!r}", seconds)
    names = seen_by(output)
    if status == 1 or status < 0:  # below 0: the library brought the process down
        return Outcome(fault, KILLED, names[0] if names else f"exit status {status}", seconds)
    last = "".join(output.strip().splitlines()[-1:])[:160]
    return Outcome(fault, BROKEN, f"pytest ends with status {status}: {last}", seconds)


def build(tree: Path, *, check: bool = True) -> str:
    """Build the library of a tree, incrementally after the first time; the first error of a build that fails."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    text = done.stdout + done.stderr
    if check:
        sys.exit(f"mutants: the library cannot be built\n{text[-4000:]}")
    return next((line for line in text.splitlines() if "error" in line), "no error named")[:160]


def table(outcomes: list[Outcome]) -> Table:
    shown = Table("fault", "status", "detail", title="planted faults", title_justify="left")
    for outcome in outcomes:
        color = _COLORS.get(outcome.status, "white")
        shown.add_row(escape(outcome.fault.name), f"[{color}]{outcome.status}[/]", escape(outcome.detail))
    return shown


if __name__ == "__main__":
    raise SystemExit(main())
