"""Memory that a process may take: the machine, cgroup v2 and v1, nested limits."""

from __future__ import annotations

import pytest

from kt_sft import memory
from kt_sft.errors import NotEnoughMemory
from kt_sft.models.spec import ExpertsSpec

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path):
    """/proc and /sys/fs/cgroup of a machine with 8 GiB free."""
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroup.mkdir()
    (proc / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    return proc, cgroup


def limit_v2(folder, limit, current, *, inactive=0, active=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\nactive_file {active}\n")


def test_without_cgroup_the_machine_limits(machine):
    found = memory.available_memory(*machine)
    assert found.bytes == 8 * GIB and "machine" in found.limited_by


def test_cgroup_v2_limit_counts_page_cache_as_free(machine):
    proc, cgroup = machine
    (proc / "self" / "cgroup").write_text("0::/jobs/mine\n")
    limit_v2(cgroup / "jobs" / "mine", 4 * GIB, 3 * GIB, inactive=GIB // 2, active=GIB // 2)
    found = memory.available_memory(proc, cgroup)
    assert found.bytes == 2 * GIB and "cgroup" in found.limited_by


def test_the_tightest_ancestor_counts(machine):
    proc, cgroup = machine
    (proc / "self" / "cgroup").write_text("0::/jobs/mine\n")
    limit_v2(cgroup / "jobs" / "mine", "max", GIB)
    limit_v2(cgroup / "jobs", 3 * GIB, 2 * GIB)
    assert memory.available_memory(proc, cgroup).bytes == GIB


def test_container_whose_own_cgroup_is_mounted_as_the_root(machine):
    proc, cgroup = machine
    (proc / "self" / "cgroup").write_text("0::/host/path/of/the/container\n")
    limit_v2(cgroup, 2 * GIB, GIB)
    assert memory.available_memory(proc, cgroup).bytes == GIB


@pytest.mark.parametrize(("limit", "free"), [(2 * GIB, GIB), (9223372036854771712, 8 * GIB)])
def test_cgroup_v1(machine, limit, free):
    proc, cgroup = machine
    (proc / "self" / "cgroup").write_text("5:cpu,cpuacct:/x\n9:memory:/jobs\n")
    folder = cgroup / "memory" / "jobs"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{GIB + GIB // 4}\n")
    (folder / "memory.stat").write_text(f"inactive_file 7\ntotal_inactive_file {GIB // 4}\ntotal_active_file 0\n")
    assert memory.available_memory(proc, cgroup).bytes == free


def test_usage_above_the_limit_leaves_nothing(machine):
    proc, cgroup = machine
    (proc / "self" / "cgroup").write_text("0::/\n")
    limit_v2(cgroup, GIB, 2 * GIB)
    assert memory.available_memory(proc, cgroup).bytes == 0


def test_this_machine_has_memory():
    assert memory.available_memory().bytes > 0


def test_estimate_adds_components_and_multiplies_by_processes():
    spec = ExpertsSpec(num_experts=4, hidden=10, inter=6)
    needed = memory.estimate({"a": spec, "b": spec}, [1000, 2000], 500, ranks=2)
    assert needed.staging_bytes == 2 * 3 * 10 * 6
    assert needed.total_bytes == 2 * (3000 + 360 + 500)
    assert "times 2 processes" in needed.describe()


def test_check_says_needed_and_available_in_gib():
    needed = memory.MemoryEstimate(experts_bytes=5 * GIB, staging_bytes=0, rest_bytes=GIB)
    memory.check(needed, memory.AvailableMemory(6 * GIB, "x"))
    with pytest.raises(
        NotEnoughMemory, match=r"needed 6\.00 GiB, available 2\.00 GiB \(limited by the cgroup's"
    ) as caught:
        memory.check(needed, memory.AvailableMemory(2 * GIB, "the cgroup's memory limit"))
    assert "experts 5.00 GiB" in str(caught.value) and "\n" not in str(caught.value)


def test_check_names_the_formats_that_would_fit():
    needed, available = memory.MemoryEstimate(40 * GIB, 0, 0), memory.AvailableMemory(21 * GIB, "x")
    smaller = {"INT8": memory.MemoryEstimate(12 * GIB + GIB // 3, 0, 0), "INT4": memory.MemoryEstimate(7 * GIB, 0, 0)}
    with pytest.raises(NotEnoughMemory, match=r"smaller format of the experts \(INT8 needs 12\.3 GiB, INT4 needs 7\.0"):
        memory.check(needed, available, smaller)
    with pytest.raises(NotEnoughMemory) as caught:
        memory.check(needed, memory.AvailableMemory(6 * GIB, "x"), smaller)
    assert "format" not in str(caught.value)
