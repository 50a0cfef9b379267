"""Where the time of the demo's training step goes.

    python scripts/demo/profile_training.py [--method int8] [--steps 20] [kt_key=value ...]

Trains as the demo does (LLaMA-Factory, examples/train_lora/tiny_moe.yaml), in this process, with clocks around the
native calls, around everything that the experts do, and around the optimizer. The model must have been built.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["USE_KT"] = "1"  # read when torch is imported

import json
import logging
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from kt_sft.formats.staging import write_text

ROOT = Path(__file__).resolve().parents[2]
TRAIN_YAML = ROOT / "examples/train_lora/tiny_moe.yaml"
WARM_UP_STEPS = 3
PARTS = {  # clock -> what it is
    "kernels forward": "native forward of all layers",
    "kernels backward": "native backward of all layers",
    "experts, rest": "copies, casts and layouts around the kernels",
    "optimizer": "AdamW, f32, on the CPU",
    "model, rest": "attention, router, norms, lm_head, loss, Trainer",
}


class Clocks:
    """Seconds by name; a step's worth is taken off at its end."""

    def __init__(self) -> None:
        self.running: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []

    def timed(self, name: str, function: Callable) -> Callable:
        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.running[name] += time.perf_counter() - start

        return wrapper

    def end_step(self, seconds: float) -> None:
        got, self.running = self.running, defaultdict(float)
        kernels = {name: got[name] for name in ("kernels forward", "kernels backward")}
        experts = got["experts forward"] + got["experts backward"] - sum(kernels.values())
        rest = seconds - sum(kernels.values()) - experts - got["optimizer"]
        parts = {**kernels, "experts, rest": experts, "optimizer": got["optimizer"], "model, rest": rest}
        self.steps.append({"step": seconds, **parts})


class TimedLayer:
    """A native layer whose two passes are timed."""

    def __init__(self, layer: Any, clocks: Clocks):
        self._layer = layer
        self.forward = clocks.timed("kernels forward", layer.forward)
        self.backward = clocks.timed("kernels backward", layer.backward)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class StepClock(TrainerCallback):
    """Puts the clocks into the model and reads them after every step."""

    def __init__(self, clocks: Clocks):
        self.clocks = clocks
        self._start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **_: Any) -> None:
        from kt_sft.autograd import moe
        from kt_sft.models.spec import iter_routed_experts

        for _, experts in iter_routed_experts(model):
            experts.layer = TimedLayer(experts.layer, self.clocks)
            experts.forward = self.clocks.timed("experts forward", experts.forward)
        for half in (moe._Join, moe._Submit):
            half.backward = staticmethod(self.clocks.timed("experts backward", half.backward))
        optimizer.step = self.clocks.timed("optimizer", optimizer.step)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.clocks.running.clear()
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clocks.end_step(time.perf_counter() - self._start)


def profile(keys: dict[str, Any]) -> list[dict[str, float]]:
    """Seconds of every step after the warm-up, whole and by part."""
    from llamafactory.train.tuner import run_exp

    logging.disable(logging.INFO)
    clocks = Clocks()
    run_exp(args=keys, callbacks=[StepClock(clocks)])
    return clocks.steps[WARM_UP_STEPS:]


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """Median step [s] and the mean share of each part."""
    total = sum(step["step"] for step in steps)
    shares = {name: sum(step[name] for step in steps) / total for name in PARTS}
    return {"median_step_s": statistics.median(step["step"] for step in steps), "num_steps": len(steps), **shares}


def show(result: dict[str, float], console: Console) -> None:
    table = Table("part of the step", "share", "ms", "what it is")
    step_ms = 1e3 * result["median_step_s"]
    for name, text in PARTS.items():
        table.add_row(name, f"{result[name]:.1%}", f"{result[name] * step_ms:.0f}", text)
    console.print(table)
    kernels = result["kernels forward"] + result["kernels backward"]
    console.print(f"median step {step_ms:.0f} ms over {result['num_steps']} steps, kernels {kernels:.1%}")


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="Further keys of the YAML, key=value.")] = None,
    method: Annotated[str, typer.Option(help="Weight format of the experts: bf16, int8 or int4.")] = "bf16",
    steps: Annotated[int, typer.Option(help="Measured steps.", min=1)] = 20,
    out: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
) -> None:
    """Train the demo model for a few steps and say which part of a step takes how long."""
    keys = yaml.safe_load(TRAIN_YAML.read_text(encoding="utf-8"))
    keys |= {"kt_method": method.upper(), "max_steps": WARM_UP_STEPS + steps, "plot_loss": False}
    keys |= {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in overrides or [])}
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        result = summary(profile({**keys, "output_dir": folder}))
    show(result, Console(width=110))
    if out is not None:
        write_text(out, json.dumps({"method": method, **result}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
