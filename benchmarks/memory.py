"""Memory of packed experts: bytes by arithmetic, and the peak of loading a layer, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import ROOT
from benchmarks.kt_sft_contender import GROUP_SIZE
from benchmarks.problem import LayerShape

FORMATS = ("bf16", "int8", "int4")


def own_bytes(shape: LayerShape, weight_format: str) -> float:
    """Bytes of a layer's weights in a format with the scales that it has: f32 per channel (int8), bf16 per group."""
    weights = 3 * shape.hidden * shape.inter
    channels = 2 * shape.inter + shape.hidden
    per_expert = {
        "bf16": 2 * weights,
        "int8": weights + 4 * channels,
        "int4": weights / 2 + 2 * weights / GROUP_SIZE,
    }
    return shape.num_experts * per_expert[weight_format]


def packed_ratio(library: object, shape: LayerShape, weight_format: str) -> float:
    """Packed bytes of a whole layer / own bytes."""
    sizes = (shape.num_experts, shape.hidden, shape.inter)
    return library.ExpertStore.packed_bytes_for(*sizes, weight_format, GROUP_SIZE) / own_bytes(shape, weight_format)


def load_peak_ratios(shape: LayerShape) -> dict[str, float]:
    """Growth of the resident peak while a layer is loaded expert by expert / (packed bytes + one expert in bf16)."""
    sizes = map(str, (shape.num_experts, shape.hidden, shape.inter))
    # Without a fixed threshold glibc keeps freed tensors of some megabytes, which are not the layer's to count.
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536")
    command = [sys.executable, "-m", "benchmarks.memory", *sizes]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"load peak: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def _measure(weight_format: str, num_experts: int, hidden: int, inter: int) -> float:
    import torch

    from kt_sft.models.spec import ExpertsSpec
    from kt_sft.nn.routed_experts import RoutedExperts

    def expert(hidden: int, inter: int) -> tuple:
        gate, up = (torch.full((inter, hidden), 0.5, dtype=torch.bfloat16) for _ in range(2))
        return gate, up, torch.full((hidden, inter), 0.5, dtype=torch.bfloat16)

    def load(num_experts: int, hidden: int, inter: int) -> RoutedExperts:
        experts = RoutedExperts(ExpertsSpec(num_experts, hidden, inter, "silu"), formats=weight_format)
        for index in range(num_experts):
            experts.load_expert(index, *expert(hidden, inter))
        return experts

    load(1, 64, 64)  # threads, allocator and library are there before the count starts
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    before = _status_bytes("VmRSS")
    experts = load(num_experts, hidden, inter)
    return (_status_bytes("VmHWM") - before) / (experts.packed_bytes + 6 * hidden * inter)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("sizes", nargs=3, type=int, metavar="N", help="experts, hidden, inter")
    sizes = parser.parse_args().sizes
    print(json.dumps({one: _measure(one, *sizes) for one in FORMATS}))
