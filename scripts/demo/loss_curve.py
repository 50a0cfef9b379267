"""Draws the loss curve of a LLaMA-Factory run from its trainer_log.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

from kt_sft.formats.staging import new_file


def read_losses(log: Path) -> tuple[list[int], list[float]]:
    """Steps and their losses; complete lines only, so a log that is being written can be read too."""
    steps, losses = [], []
    if log.exists():
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry.get("loss") is not None:
                steps.append(entry["current_steps"])
                losses.append(entry["loss"])
    return steps, losses


def moving_mean(values: list[float], width: int) -> list[float]:
    """Mean of the last `width` values (fewer at the beginning)."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(width, i + 1) for i in range(len(values))]


def draw(steps: list[int], losses: list[float], path: Path, *, title: str) -> None:
    from matplotlib.figure import Figure  # without pyplot: needs no display and leaves no global state

    width = max(1, len(losses) // 10)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="each step")
    axes.plot(steps, moving_mean(losses, width), color="tab:blue", linewidth=2, label=f"mean of the last {width} steps")
    axes.set_xlabel("training step")
    axes.set_ylabel("loss: cross-entropy per answer token [nats]")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    with new_file(path) as stream:
        figure.savefig(stream, dpi=150, format=path.suffix[1:])
