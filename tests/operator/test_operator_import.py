"""What `from kt_sft import KTMoEWrapper` costs a program that has no transformers model: time, and modules."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Libraries of models and adapters, the rooms that know them, and torch's compiler.
STRANGERS = ("transformers", "peft", "accelerate", "llamafactory", "torch._dynamo", "kt_sft.integrations.peft")
MOST_SECONDS, OF_TORCH = 0.3, 0.2  # beyond `import torch`; of its time where the machine is busy
MOST_MODULES = 120

SCRIPT = """
import json, sys, time
start = time.perf_counter()
import torch
torch_s = time.perf_counter() - start
before = set(sys.modules)
from kt_sft import KTMoEWrapper
found = {"torch_s": torch_s, "operator_s": time.perf_counter() - start - torch_s}
found["import"] = sorted(set(sys.modules) - before)
if len(sys.argv) > 1:
    sizes = dict(num_experts=2, num_experts_per_tok=1, hidden_size=64, moe_intermediate_size=32)
    sizes["weight_path"] = sys.argv[1]
    saved = KTMoEWrapper(0, **sizes, cpu_save=True)
    saved.load_weights_from_tensors(torch.ones(2, 32, 64), torch.ones(2, 32, 64), torch.ones(2, 64, 32))
    packed = KTMoEWrapper(0, **sizes)
    packed.load_weights()
    tokens = torch.ones(3, 64), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    found["are equal"] = bool(torch.equal(saved.forward(*tokens), packed.forward(*tokens)))
    packed.submit_forward(*tokens)
    packed.sync_forward(tokens[0])
    found["use"] = sorted(set(sys.modules) - before)
print(json.dumps(found))
"""


def run(*arguments: str) -> dict:
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def used(tmp_path_factory) -> dict:
    """A process that imports the operator, packs a layer from tensors, loads it from a container and computes."""
    return run(str(tmp_path_factory.mktemp("packed") / "container"))


@pytest.mark.parametrize("when", ["import", "use"])
def test_the_operator_loads_no_library_of_models(used, when):
    strangers = [name for name in used[when] if name.startswith(STRANGERS)]
    assert not strangers
    assert used["are equal"]


def test_importing_the_operator_loads_few_modules(used):
    assert len(used["import"]) <= MOST_MODULES


def test_importing_the_operator_takes_little_beside_torch(used):
    runs = [used]
    while len(runs) < 3 and not any(is_quick(one) for one in runs):
        runs.append(run())
    assert any(is_quick(one) for one in runs), [(one["torch_s"], one["operator_s"]) for one in runs]


def is_quick(one: dict) -> bool:
    return one["operator_s"] <= max(MOST_SECONDS, OF_TORCH * one["torch_s"])
