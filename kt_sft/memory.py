"""Bytes a model needs against bytes this process may still take, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kt_sft.errors import GIB, NotEnoughMemory

if TYPE_CHECKING:
    from kt_sft.models.spec import ExpertsSpec

# cgroup v1 writes "no limit" as the largest page-aligned int64.
_NO_LIMIT_BYTES = 1 << 60


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes while and after loading, by component, for one process; `ranks` processes share the machine.

    `mapped_bytes` are experts in mapped files: all processes share them, and the system may drop and read them again.
    """

    experts_bytes: int
    staging_bytes: int
    rest_bytes: int
    ranks: int = 1
    mapped_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All components that must stay in memory, all processes."""
        return self.ranks * (self.experts_bytes + self.staging_bytes + self.rest_bytes)

    def describe(self) -> str:
        """One line for messages."""
        parts = (
            f"experts {self.experts_bytes / GIB:.2f} GiB + rest {(self.rest_bytes + self.staging_bytes) / GIB:.2f} GiB"
        )
        return f"{parts}, times {self.ranks} processes" if self.ranks > 1 else parts


@dataclass(frozen=True)
class AvailableMemory:
    """Bytes that can still be taken without swapping, and what sets the limit."""

    bytes: int
    limited_by: str


def estimate(
    specs: Mapping[str, ExpertsSpec],
    packed_bytes: Iterable[int],
    rest_bytes: int,
    *,
    ranks: int = 1,
    is_mapped: bool = False,
) -> MemoryEstimate:
    """Estimate for a model.

    Args:
        specs: routed experts by module name.
        packed_bytes: packed size of each of them.
        rest_bytes: everything else that stays in main memory.
        is_mapped: the packed experts are used in mapped files.
    """
    staging = max((spec.expert_bytes for spec in specs.values()), default=0)
    total = sum(packed_bytes)
    return MemoryEstimate(0 if is_mapped else total, staging, rest_bytes, ranks, total if is_mapped else 0)


def check(
    needed: MemoryEstimate,
    available: AvailableMemory,
    smaller: Mapping[str, MemoryEstimate] | None = None,
    *,
    what: str = "the model",
) -> None:
    """Raise unless the model fits.

    Args:
        what: names it in messages.
        smaller: what other weight formats would need, by name; the message names those that fit.

    Raises:
        NotEnoughMemory: needed and available in GiB, with what limits it.
    """
    if needed.total_bytes <= available.bytes:
        return
    fitting = [
        f"{name} needs {other.total_bytes / GIB:.1f} GiB"
        for name, other in (smaller or {}).items()
        if other.total_bytes <= available.bytes
    ]
    others = f"use a smaller format of the experts ({', '.join(fitting)}), or " if fitting else ""
    raise NotEnoughMemory(
        f"memory for {what} ({needed.describe()})",
        needed_bytes=needed.total_bytes,
        available_bytes=available.bytes,
        limited_by=available.limited_by,
        remedy=f"{others}free memory, raise the container's limit, or use a machine with more",
    )


def mapped_shortage(needed: MemoryEstimate, available: AvailableMemory) -> str | None:
    """A warning where mapped experts do not all fit beside the rest: that works, at the speed of the disk."""
    missing = needed.total_bytes + needed.mapped_bytes - available.bytes
    if not needed.mapped_bytes or missing <= 0:
        return None
    return (
        f"memory: the mapped experts need {needed.mapped_bytes / GIB:.2f} GiB beside "
        f"{needed.total_bytes / GIB:.2f} GiB, available are {available.bytes / GIB:.2f} GiB "
        f"(limited by {available.limited_by}): {missing / GIB:.2f} GiB "
        "of them are read from disk again and again, which is slow; a smaller format or more memory helps"
    )


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> AvailableMemory:
    """The tightest of MemAvailable and every cgroup (v1 or v2) above this process.

    Args:
        proc, cgroup: mount points, replaced in tests.
    """
    candidates = [AvailableMemory(_meminfo(proc), "the machine's free memory")]
    candidates += [AvailableMemory(free, "the cgroup's memory limit") for free in _cgroup_free(proc, cgroup)]
    return min(candidates, key=lambda candidate: candidate.bytes)


def _meminfo(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{proc / 'meminfo'}: expected a MemAvailable line, found none; Linux 3.14 or later is needed")


def _cgroup_free(proc: Path, mount: Path) -> Iterable[int]:
    """Free bytes of each limited cgroup from ours up to the mount point."""
    for line in _lines(proc / "self" / "cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            root, names = mount, ("memory.max", "memory.current", "inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            root = mount / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
        else:
            continue
        here = root / path.strip("/")
        # A container often mounts its own cgroup as the root while /proc names the host's path.
        here = here if here.is_dir() else root
        for folder in (here, *here.parents):
            free = _folder_free(folder, names)
            if free is not None:
                yield free
            if folder == root:
                break


def _folder_free(folder: Path, names: tuple[str, str, str, str]) -> int | None:
    limit_name, usage_name, *cache_names = names
    limit = _number(folder / limit_name)
    usage = _number(folder / usage_name)
    if limit is None or usage is None or limit >= _NO_LIMIT_BYTES:
        return None
    stat = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat") if " " in line)
    # The page cache of files counts as usage, yet the kernel drops it when memory is asked for.
    cache = sum(int(stat.get(name, 0)) for name in cache_names)
    return max(0, limit - max(0, usage - cache))


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
