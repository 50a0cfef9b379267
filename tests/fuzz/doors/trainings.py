"""Doors to the state of a training that is not JSON: what a run that goes on reads of its optimizer and schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kt_sft.integrations.llamafactory import resuming
from tests.fuzz.case import Door, Subject
from tests.fuzz.documents import TorchArchive

_SHAPES = [(2, 3), (3, 2)]


def _optimizer(_: Path) -> Subject:
    moments = {
        place: {"step": torch.tensor(3.0), "exp_avg": torch.ones(shape), "exp_avg_sq": torch.ones(shape)}
        for place, shape in enumerate(_SHAPES)
    }
    group = {"lr": 0.1, "betas": [0.9, 0.99], "weight_decay": 0.0, "initial_lr": 0.1, "params": [0, 1]}
    state = {"state": moments, "param_groups": [group, {**group, "params": []}]}
    words = ("exp_avg", "exp_avg_sq", "momentum_buffer", "params", "lr", "param_groups", "state", (2, 3), 0, 1, "0")
    files = {
        "optimizer.pt": TorchArchive(state, words),
        "scheduler.pt": TorchArchive({"base_lrs": [0.1, 0.1], "last_epoch": 3}, ("base_lrs", [float("nan")])),
    }
    return Subject(files, _read)


def _read(folder: Path) -> Any:
    state = resuming.read_optimizer(folder)
    rates = resuming._rates(folder, state)
    assert all(isinstance(rate, int | float) for rate in rates)
    if state is not None:
        resuming.check_optimizer(folder, state, _SHAPES, is_ordered=True)
        resuming.check_optimizer(folder, state, _SHAPES, is_ordered=False)
    return state


DOORS = (Door("optimizer", _optimizer, loads=True),)
