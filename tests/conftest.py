"""Shared by all tests: no network, seeds, and what this machine can run, printed once."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # before any import of transformers; inherited by every process that tests start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # tests.helpers, benchmarks and scripts are imported as packages of the repository
    sys.path.insert(0, str(ROOT))


def _cpu_flags() -> frozenset[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def _kernel_levels() -> list[str]:
    """What the kernels find in this CPU; an emulator that is preloaded counts (docs/testing_avx512.md)."""
    try:
        from kt_sft.native import native

        return native().isa_detected()
    except ImportError:
        return []


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _missing_hardware() -> dict[str, str]:
    """Mark -> reason for which its tests are skipped on this machine."""
    missing = {}
    if not any(level.startswith("amx") for level in _kernel_levels()):
        missing["amx"] = "this CPU has no AMX, or the system does not let programs use it"
    if not _gpu_count():
        missing["gpu"] = "torch sees no CUDA device"
    return missing


def pytest_report_header(config: pytest.Config) -> list[str]:
    flags = _cpu_flags()
    levels = [name for name in ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_tile") if name in flags]
    try:
        from kt_sft.native import native

        kernels = native().isa_active()
    except ImportError as error:
        kernels = f"not built ({str(error).splitlines()[0]})"
    cores = len(os.sched_getaffinity(0))
    return [
        f"machine: {cores} CPUs, {' '.join(levels) or 'no vector extensions'}, {_gpu_count()} GPUs; kernels: {kernels}"
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = _missing_hardware()
    for item in items:
        for mark, reason in missing.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for a test whatever ran before it."""
    random.seed(0)
    for name in ("numpy", "torch"):
        module = sys.modules.get(name)
        if module is not None:
            (module.random.seed if name == "numpy" else module.manual_seed)(0)
