"""Random calls of the bindings in a process of their own: none crashes, each is right or a Python exception."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def make_calls(seed: int, calls: int) -> str:
    """The log; it says of each seed what became of its calls."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.helpers.native_calls"]
    command += ["--seed", str(seed), "--calls", str(calls)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def check(log: str, calls: int) -> None:
    found = re.search(r"random calls: (\d+), seeds .*: (\d+) right, (\d+) refused, 0 wrong", log)
    made, right, refused = map(int, found.groups())
    assert calls <= made < calls + 8 and right > made / 4 and refused > made / 4


def test_random_calls_are_right_or_refused():
    check(make_calls(1, 1000), 1000)


@pytest.mark.fuzz
def test_many_random_calls_are_right_or_refused():
    log = make_calls(secrets.randbelow(10**9), 20_000)
    print(log)
    check(log, 20_000)
