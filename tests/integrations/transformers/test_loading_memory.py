"""While loading, anonymous memory holds the packed experts, one expert, and the rest of the model; nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny_models

ROOT = Path(__file__).resolve().parents[3]
SIZES = {"hidden_size": 512, "moe_intermediate_size": 320, "num_experts": 24, "num_hidden_layers": 3, "vocab_size": 200}
# Python objects, allocator slack and thread stacks; below the size of one fused tensor (15 MiB), which is what a loader
# that does not slice would add.
SLACK_BYTES = 6 << 20

PROBE = """
import json, sys, threading, time
import torch
import kt_sft
from kt_sft.models.spec import iter_routed_experts

def anonymous_bytes():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

kt_sft.load_model(sys.argv[1])  # imports what transformers imports lazily, starts the threads
base, peak, done = anonymous_bytes(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
model = kt_sft.load_model(sys.argv[2])
done = True
watcher.join()
peak = max(peak, anonymous_bytes())
experts = [module for _, module in iter_routed_experts(model)]
placeholders = {id(p) for module in experts for p in module.parameters()}
rest = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()] if id(t) not in placeholders)
print(json.dumps({
    "grown": peak - base,
    "packed": sum(module.packed_bytes for module in experts),
    "own": sum(6 * m.spec.num_experts * m.spec.hidden * m.spec.inter for m in experts),
    "expert": 6 * experts[0].spec.hidden * experts[0].spec.inter,
    "rest": rest,
}))
"""


@pytest.fixture(scope="module")
def warm_up(tmp_path_factory):
    return tiny_models.build("qwen3_moe", tmp_path_factory.mktemp("warm"))


def measure(warm_up, directory):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DEACTIVATE_ASYNC_LOAD": "1",
    }
    command = [sys.executable, "-c", PROBE, str(warm_up), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fused", [True, False])
def test_anonymous_memory_while_loading(tmp_path, warm_up, fused, dtype):
    directory = tiny_models.build("qwen3_moe", tmp_path, fused=fused, dtype=dtype, **SIZES)
    found = measure(warm_up, directory)
    # An fp32 checkpoint has its expert converted beside the mapped original.
    allowed = found["packed"] + found["expert"] + found["rest"] + SLACK_BYTES
    assert found["grown"] <= allowed, found
    assert found["packed"] <= 1.03 * found["own"], found
    # The measurement sees what it should: the packed copy is anonymous memory.
    assert found["grown"] >= 0.9 * found["packed"], found
