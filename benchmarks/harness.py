"""Interleaved timing of several contenders, each sample between two probes of the machine.

All contenders of a case run in the same rounds, so a slow minute of the machine hits them alike. Each has its warm-up
before the first round, and its answer has been checked by the caller before it is timed at all.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, field, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from benchmarks.roofline import ROOT, Limits
from kt_sft.formats.staging import write_text

SCHEMA = 1
RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case: `run(batch)` does it once, for one of the rotating input batches."""

    name: str
    run: Callable[[int], object]
    estimate_seconds: float  # of one run, from a smaller pilot; decides how many samples it gets
    reports_seconds: bool = False  # run() returns the seconds of the work: another process did it and timed it


@dataclass(frozen=True)
class Sample:
    round: int
    seconds: float
    limits: Limits  # mean of the probes before and after


@dataclass(frozen=True)
class Work:
    """What one run has to do at least, counted from shapes."""

    flops: float
    bytes: float  # of weights that must be read


FRACTIONS: dict[str, Callable[[Work, Sample], float]] = {
    "fma": lambda work, one: work.flops / one.seconds / one.limits.fma_flops,
    "dram": lambda work, one: work.bytes / one.seconds / one.limits.dram_bytes,
    "unit": lambda work, one: work.flops / one.seconds / one.limits.unit_ops if one.limits.unit_ops else 0.0,
}


@dataclass
class Summary:
    """One contender of one case; fractions are of the probed limits, medians over samples."""

    name: str
    samples: int
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    gflops: float | None = None
    fma_fraction: float | None = None
    dram_fraction: float | None = None
    unit_fraction: float | None = None  # of the compute unit that the case names
    ratio: float | None = None  # time of this contender / time of ours, median over shared rounds
    is_bound: bool = False  # ratio is a lower bound: of fewer tokens, since the contender is too slow to time
    error: float | None = None  # worst norm-wise relative error of its answer and gradients
    note: str = ""


@dataclass
class CaseResult:
    """One line group of the report: a model's layer, a number of tokens, forward or forward + backward."""

    model: str
    mode: str
    hidden: int
    inter: int
    num_experts: int
    top_k: int
    tokens: int
    tokens_equivalent: int
    lora_rank: int
    work_gflop: float
    probe_fma_gflops: float
    probe_dram_gbs: float
    unit: str = ""  # roofline.UNITS
    contenders: list[Summary] = field(default_factory=list)


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics, as numpy's default; values need not be sorted."""
    if not values:
        raise ValueError("quantile: expected at least one value, got none")
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def plan_samples(estimates: Sequence[float], budget_seconds: float, *, most: int, least: int) -> list[int]:
    """Number of samples per contender: equal shares of the budget, what a cheap one leaves over goes to the others."""
    counts = [0] * len(estimates)
    left = budget_seconds
    for done, index in enumerate(sorted(range(len(estimates)), key=lambda i: estimates[i])):
        share = left / (len(estimates) - done)
        counts[index] = max(least, min(most, int(share / max(estimates[index], 1e-9))))
        left = max(0.0, left - counts[index] * estimates[index])
    return counts


def takes_part(round_index: int, count: int, rounds: int) -> bool:
    """Whether a contender with `count` samples runs in this round: the samples are spread evenly over the rounds."""
    return (round_index + 1) * count // rounds > round_index * count // rounds


def run_interleaved(
    contenders: Sequence[Contender],
    probe: Callable[[], Limits],
    counts: Sequence[int],
    *,
    warmups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Sample]]:
    """Time every contender `counts[i]` times in shared rounds; batch number = round, so weights and routes rotate."""
    samples: dict[str, list[Sample]] = {one.name: [] for one in contenders}
    for one in contenders:
        for batch in range(warmups):
            one.run(batch)
    rounds = max(counts, default=0)
    before = probe()
    for index in range(rounds):
        for one, count in zip(contenders, counts, strict=True):
            if not takes_part(index, count, rounds):
                continue
            start = clock()
            result = one.run(index)
            seconds = float(result) if one.reports_seconds else clock() - start
            after = probe()
            pairs = zip(astuple(before), astuple(after), strict=True)
            between = Limits(*((a + b) / 2 for a, b in pairs))
            samples[one.name].append(Sample(index, seconds, between))
            before = after
    return samples


def fraction(which: str, work: Work, samples: Sequence[Sample]) -> float | None:
    """Median over the samples of the part of a limit (fma, dram, unit) that was reached; None without samples."""
    return median(FRACTIONS[which](work, one) for one in samples) if samples else None


def time_ratio(samples: Sequence[Sample], ours: Sequence[Sample]) -> float | None:
    """Time / our time, median over the rounds that both ran in; None if there is none."""
    our_times = {one.round: one.seconds for one in ours}
    pairs = [one.seconds / our_times[one.round] for one in samples if one.round in our_times]
    return median(pairs) if pairs else None


def summarise(name: str, samples: Sequence[Sample], work: Work, ours: Sequence[Sample]) -> Summary:
    """Median, p20, p80, rates, fractions of the limits, and the ratio to ours over the rounds that both ran in."""
    if not samples:
        return Summary(name, 0, None, None, None)
    times = [one.seconds for one in samples]
    return Summary(
        name=name,
        samples=len(times),
        median_ms=median(times) * 1e3,
        p20_ms=quantile(times, 0.2) * 1e3,
        p80_ms=quantile(times, 0.8) * 1e3,
        gflops=work.flops / median(times) / 1e9,
        fma_fraction=fraction("fma", work, samples),
        dram_fraction=fraction("dram", work, samples),
        ratio=time_ratio(samples, ours),
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def machine_slug(cpu_model: str, cores: int) -> str:
    """Folder name of a machine: CPU model and cores; `Intel(R) Xeon(R) CPU @ 2.80GHz`, 2 -> `intel-xeon-2-80ghz-2c`."""
    plain = re.sub(r"\((r|tm)\)|\b(cpu|processor)\b", " ", cpu_model.lower())
    return f"{re.sub(r'[^a-z0-9]+', '-', plain).strip('-')}-{cores}c"


def _output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _library_compiler(library: Path) -> str:
    """Compiler that built a shared library, from the note that it leaves in the file; '' if there is none."""
    found = re.search(rb"(?:GCC: \([^\0]*?\) [\d.]+|clang version [\d.]+)", library.read_bytes())
    return found.group().decode() if found else ""


def _build_flags() -> str:
    """Flags of an editable build of the native library, from CMake's cache; '' where it was not built in this tree."""
    wanted = re.compile(r"^(CMAKE_BUILD_TYPE|CMAKE_CXX_FLAGS|CMAKE_CXX_FLAGS_RELEASE):\w+=(.+)$", re.M)
    cache = ROOT / "build" / "native" / "CMakeCache.txt"
    return " ".join(f"{key}={value}" for key, value in wanted.findall(cache.read_text())) if cache.is_file() else ""


def _cpu_ticks() -> tuple[int, int]:
    """(idle, all) clock ticks of all CPUs since boot."""
    user, nice, system, idle, iowait, *rest = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    return idle + iowait, user + nice + system + idle + iowait + sum(rest)


def busy_cpus(seconds: float = 0.4) -> float:
    """CPUs that other processes keep busy now: measured while this one sleeps."""
    idle, total = _cpu_ticks()
    time.sleep(seconds)
    idle_later, total_later = _cpu_ticks()
    return (os.cpu_count() or 1) * (1 - (idle_later - idle) / max(1, total_later - total))


def machine_record(threads: int, isa: str, library: Path | None = None) -> dict[str, object]:
    """Everything a reader needs to judge the figures. It holds no host name and no path."""
    import torch

    nodes = sorted(path.name for path in Path("/sys/devices/system/node").glob("node[0-9]*"))
    affinity = sorted(os.sched_getaffinity(0))
    commit = _output_of("git", "rev-parse", "HEAD")
    return {
        "cpu": _cpu_model(),
        "logical_cpus": os.cpu_count(),
        "cpus_allowed": len(affinity),
        "cores_used": threads,
        "numa_nodes": max(1, len(nodes)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "cpus_busy_with_other_work": round(busy_cpus(), 2),
        "isa": isa,
        "compiler": _library_compiler(library) if library else "",
        "flags": _build_flags(),
        "commit": commit or "none",
        "uncommitted_changes": bool(_output_of("git", "status", "--porcelain")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def save_results(
    machine: dict[str, object],
    limits: dict[str, object],
    cases: Sequence[object],
    *,
    bench: str,
    mode: str,
    more: dict[str, object] | None = None,
    folder: Path = RESULTS,
) -> Path:
    """Append one run to `<folder>/<machine>/<date>.json` and return that path.

    Args:
        cases: dataclasses or dictionaries.
        more: further keys of the run.
    """
    now = datetime.now(UTC)
    path = folder / machine_slug(str(machine["cpu"]), int(machine["cores_used"])) / f"{now:%Y-%m-%d}.json"
    content = json.loads(path.read_text()) if path.exists() else {"schema": SCHEMA, "runs": []}
    content["runs"].append(
        {
            "bench": bench,
            "mode": mode,
            "time_utc": f"{now:%H:%M:%S}",
            "machine": machine,
            "limits": _rounded(limits),
            "cases": [_rounded(asdict(case) if is_dataclass(case) else case) for case in cases],
            **(more or {}),
        }
    )
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def _rounded(value: object) -> object:
    """Five significant digits: more would be noise, and would make every line of a diff differ."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
