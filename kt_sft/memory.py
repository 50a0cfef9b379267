"""Bytes a model needs against bytes this process may still take, before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kt_sft import env
from kt_sft.errors import GIB, NotEnoughMemory
from kt_sft.native import native

if TYPE_CHECKING:
    from kt_sft.models.layout import ExpertsSpec, Formats

logger = logging.getLogger(__name__)

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


def packed_bytes(specs: Mapping[str, ExpertsSpec], formats: Mapping[str, Formats], group: int) -> dict[str, int]:
    """What the kernels hold of each experts module.

    Args:
        formats: by module name.
        group: weights that share a scale in int4 and rawint4.
    """
    of = native().ExpertStore.packed_bytes_for
    return {name: of(s.num_experts, s.hidden, s.inter, formats[name], group) for name, s in specs.items()}


def needed(
    specs: Mapping[str, ExpertsSpec],
    rest_bytes: int,
    formats: Mapping[str, Formats],
    group: int,
    *,
    is_mapped: bool = False,
) -> MemoryEstimate:
    """The same for all processes of this machine, from what the kernels will hold.

    Args:
        formats: by module name.
        group: weights that share a scale in int4 and rawint4.
    """
    sizes = packed_bytes(specs, formats, group).values()
    if is_mapped and (pools := native().num_pools()) > 1:  # each has sums of its own over the columns of down
        int8 = [spec for name, spec in specs.items() if formats[name] == "int8"]
        rest_bytes += sum(spec.num_experts * pools * -(-spec.hidden // 32) * 32 * 4 for spec in int8)
    return estimate(specs, sizes, rest_bytes, ranks=env.local_world_size(), is_mapped=is_mapped)


def check_experts(
    specs: Mapping[str, ExpertsSpec],
    rest_bytes: int,
    formats: Mapping[str, Formats],
    group: int,
    *,
    method: str,
    is_mapped: bool = False,
) -> None:
    """Raise unless the experts fit beside the rest; warn where mapped experts will be read again and again.

    Args:
        specs, rest_bytes, formats, group, is_mapped: see `needed`.
        method: that the formats follow from; others are named where they would fit.
    Raises:
        NotEnoughMemory: needed and available bytes, and the formats that would fit.
    """
    smaller = {
        other: needed(specs, rest_bytes, dict.fromkeys(specs, other.lower()), group, is_mapped=is_mapped)
        for other in ("INT8", "INT4")
        if other != method
    }
    wanted, available = needed(specs, rest_bytes, formats, group, is_mapped=is_mapped), available_memory()
    check(wanted, available, smaller)
    if warning := mapped_shortage(wanted, available):
        logger.warning(warning)


def check_together(models: Sequence[MemoryEstimate], what: str) -> None:
    """Raise unless several models fit beside one another.

    Args:
        what: names them in messages.
    Raises:
        NotEnoughMemory: needed bytes of all of them, and available bytes.
    """
    experts, rest = (sum(getattr(one, name) for one in models) for name in ("experts_bytes", "rest_bytes"))
    staging = max(one.staging_bytes for one in models)  # they are loaded one after the other
    together = MemoryEstimate(experts, staging, rest, models[0].ranks)
    check(together, available_memory(), what=what)


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
