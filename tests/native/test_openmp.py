"""torch's idle OpenMP threads beside the kernels' workers; a process per case: libgomp reads its settings once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CALLS = """
import json, os, time, torch
from kt_sft.models.spec import ExpertsSpec
from kt_sft.native import native
from kt_sft.nn.routed_experts import RoutedExperts
torch.set_num_threads(int(os.environ["THREADS"]))
torch.randn(300, 300) @ torch.randn(300, 300)
experts = RoutedExperts(ExpertsSpec(1, 32, 16)).eval()
experts.load_expert(0, *(torch.ones(shape, dtype=torch.bfloat16) for shape in ((16, 32), (16, 32), (32, 16))))

def call():
    with torch.no_grad():
        experts(torch.ones(1, 32, dtype=torch.bfloat16), torch.tensor([[0]]), torch.ones(1, 1))

def settled(wanted):
    for _ in range(200):
        if len(os.listdir("/proc/self/task")) >= wanted:
            break
        time.sleep(0.01)
    return len(os.listdir("/proc/self/task"))

native().set_threads(1)
time.sleep(0.3)  # threads that end are gone
before = len(os.listdir("/proc/self/task"))
if "NO_THREADS" in os.environ:
    import resource
    resource.setrlimit(resource.RLIMIT_NPROC, (before + 1, before + 1))
    os.setuid(65534)  # a user who may start one
call()
team = len(os.sched_getaffinity(0)) + 1  # of which one is the thread that made it
first = settled(before + team)
call()
print(json.dumps({"more": first - before, "again": settled(first) - first, "team": team}))
"""


def threads_after(threads: int = 2, **variables: str) -> dict[str, int]:
    """Threads that the first and the second call of the experts added."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"PYTHONPATH": str(ROOT), "THREADS": str(threads), **variables}
    done = subprocess.run([sys.executable, "-c", CALLS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_more_threads_than_cpus_keep_idle_ones_from_spinning():
    found = threads_after()
    assert found["more"] == found["team"] and found["again"] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="takes the right to start threads away by becoming another user")
def test_without_threads_left_the_process_goes_on():
    assert threads_after(NO_THREADS="1")["more"] == 0


@pytest.mark.parametrize(
    ("threads", "variables"),
    [(2, {"OMP_WAIT_POLICY": "passive"}), (2, {"GOMP_SPINCOUNT": "100"}), (1, {})],
    ids=["passive", "spins as set", "one thread"],
)
def test_nothing_is_added_where_the_user_decides_or_none_would_spin(threads, variables):
    assert threads_after(threads, **variables)["more"] == 0
