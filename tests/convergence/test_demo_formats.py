"""The demo's whole training with int8 and int4 experts: the loss curve stays at that of bf16."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kt_sft.models.spec import ExpertsSpec
from kt_sft.nn.routed_experts import RoutedExperts

# the demo's modules import each other as scripts do
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "demo"))

import build_moe
import run_demo
from loss_curve import read_losses
from tiny_moe.gguf_source import SourceError

ROOT = Path(__file__).resolve().parents[2]
# Area between two loss curves, relative to the area below the expected one; each is the mean over SMOOTHED_STEPS steps,
# since one step sees a handful of rows. Not the largest ratio: the last losses are those of rows known by heart, a
# hundredth of the first, and differ by tens of percent without meaning.
SMOOTHED_STEPS = 5
# int4 rounds the weights of a 135 M model by 8 %; its scales are the best ones there are. Measured: 4 to 6 %, wherever
# it was. bf16 kernels give the same curve on the int4 values (the last test), so no kernel can mend it; less than 2 %
# would mean that the experts are not in int4.
EXPECTED = {"int8": (0.0, 0.01), "int4": (0.02, 0.08)}
ALLOWED_BETWEEN_KERNELS = 0.01


def area_between(losses: list[float], expected: list[float]) -> float:
    ours, other = (torch.tensor(curve).unfold(0, SMOOTHED_STEPS, 1).mean(1) for curve in (losses, expected))
    return ((ours - other).abs().sum() / other.sum()).item()


def round_experts(source: Path, target: Path, weight_format: str) -> int:
    """Copies a Mixtral checkpoint; its experts' weights become the numbers that the format stores for them, in bf16.

    Exact for int4; int8's numbers are rounded once more, by a tenth of what int8 has rounded.
    Returns the number of experts.
    """
    shutil.copytree(source, target)
    shards = {path: load_file(path) for path in sorted(target.glob("*.safetensors"))}
    home = {name: tensors for tensors in shards.values() for name in tensors}
    gates = [name for name in home if name.endswith(".w1.weight")]
    inter, hidden = home[gates[0]][gates[0]].shape
    rounding = RoutedExperts(ExpertsSpec(1, hidden, inter), formats=weight_format)
    for gate in gates:
        names = [gate.replace(".w1.", f".{part}.") for part in ("w1", "w3", "w2")]  # gate, up, down
        rounding.load_expert(0, *(home[name][name] for name in names))
        for name, weight in zip(names, rounding.unpack_expert(0), strict=True):
            home[name][name] = weight
    for path, tensors in shards.items():
        save_file(tensors, path, metadata={"format": "pt"})
    return len(gates)


@pytest.fixture(scope="module")
def model():
    """The demo's checkpoint."""
    folder = ROOT / run_demo.Run.from_yaml("mixtral").model
    try:
        build_moe.build(folder)
    except SourceError as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture(scope="module")
def curve_of(tmp_path_factory):
    """Losses of every step of the demo's training, by weight format and checkpoint."""

    @functools.cache
    def train(method: str, model: Path) -> list[float]:
        output = tmp_path_factory.mktemp(method)
        command = [run_demo.find_llamafactory(), *run_demo.Run.from_yaml("mixtral").command()[1:]]
        keys = {"kt_method": method.upper(), "model_name_or_path": model, "output_dir": output}
        done = subprocess.run(
            [*command, *(f"{key}={value}" for key, value in keys.items())],
            capture_output=True, text=True, cwd=ROOT, env={**os.environ, "USE_KT": "1"},
        )  # fmt: skip
        if done.returncode != 0:
            pytest.fail(done.stderr[-6000:])
        losses = read_losses(output / "trainer_log.jsonl")[1]
        if len(losses) < 50 or sum(losses[-10:]) >= 0.2 * sum(losses[:10]):
            pytest.fail(f"{method}: the run must learn something")
        return losses

    return train


@pytest.mark.slow
@pytest.mark.convergence
@pytest.mark.parametrize("method", EXPECTED)
def test_demo_learns_alike_in_every_format(curve_of, model, method):
    area = area_between(curve_of(method, model), curve_of("bf16", model))
    print(f"{method} experts, bf16 experts: {area:.2%}")
    least, most = EXPECTED[method]
    assert least <= area <= most, f"{area:.2%}"


@pytest.mark.slow
@pytest.mark.convergence
@pytest.mark.parametrize("method", EXPECTED)
def test_kernels_learn_alike_from_the_same_weights(curve_of, model, tmp_path, method):
    """What separates a format from bf16 is the rounding of the weights: given the rounded ones, bf16 learns alike."""
    rounded = tmp_path / "rounded"
    assert round_experts(model, rounded, method) > 0
    expected = curve_of("bf16", rounded)
    of_kernels = area_between(curve_of(method, model), expected)
    of_format = area_between(curve_of("bf16", model), expected)
    print(f"{method} kernels, bf16 kernels on {method} values: {of_kernels:.3%}; the rounding alone: {of_format:.2%}")
    assert of_format > of_kernels, "the rounding must show in the curve"
    assert of_kernels <= ALLOWED_BETWEEN_KERNELS, f"{of_kernels:.2%}"
