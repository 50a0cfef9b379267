"""The demo's whole training with int8 and int4 experts: the loss curve stays at that of bf16."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# the demo's modules import each other as scripts do
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "demo"))

import build_moe
import run_demo
from loss_curve import read_losses
from tiny_moe.gguf_source import SourceError

ROOT = Path(__file__).resolve().parents[2]
# Area between the loss curve and that of bf16, relative to the area below the latter. Not the largest ratio: the last
# losses are those of rows known by heart, a hundredth of the first, and differ by tens of percent without meaning.
ALLOWED = {"int8": 0.01, "int4": 0.03}


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Losses of every step of the demo's training, by weight format."""
    run = run_demo.Run.from_yaml("mixtral")
    try:
        build_moe.build(ROOT / run.model)
    except SourceError as error:
        pytest.skip(str(error))
    curves = {}
    for method in ("bf16", *ALLOWED):
        output = tmp_path_factory.mktemp(method)
        command = [run_demo.find_llamafactory(), *run.command()[1:], f"kt_method={method.upper()}"]
        done = subprocess.run(
            [*command, f"output_dir={output}"],
            capture_output=True, text=True, cwd=ROOT, env={**os.environ, "USE_KT": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-6000:]
        curves[method] = read_losses(output / "trainer_log.jsonl")[1]
    return curves


@pytest.mark.slow
@pytest.mark.convergence
@pytest.mark.parametrize("method", ALLOWED)
def test_demo_learns_alike_in_every_format(losses, method):
    expected = losses["bf16"]
    assert len(expected) >= 50 and sum(expected[-10:]) < 0.2 * sum(expected[:10]), "the run must learn something"
    between = sum(abs(loss - other) for loss, other in zip(losses[method], expected, strict=True))
    assert between <= ALLOWED[method] * sum(expected), f"{between / sum(expected):.2%}"
