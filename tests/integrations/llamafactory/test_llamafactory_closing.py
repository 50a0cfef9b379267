"""A process that ends while its model generates in a daemon waits for it, and makes it stop."""

from __future__ import annotations

import threading
import time

import torch
from torch import nn

from kt_sft.integrations.llamafactory import closing


class Endless(nn.Module):
    """Generates until its criteria say so."""

    def __init__(self):
        super().__init__()
        self.tokens = 0

    def generate(self, input_ids, stopping_criteria=()):
        while not all(bool(one(input_ids, None).all()) for one in stopping_criteria):
            self.tokens += 1
            time.sleep(0.001)
        return input_ids


def test_the_end_waits_for_a_daemon_that_generates(monkeypatch):
    monkeypatch.setattr(closing, "_ends", threading.Event())
    monkeypatch.setattr(closing.atexit, "register", lambda wait: None)
    model = Endless()
    closing.guard(model)
    thread = threading.Thread(target=model.generate, args=(torch.zeros(2, 3, dtype=torch.long),), daemon=True)
    thread.start()
    while model.tokens < 3:
        time.sleep(0.001)
    assert thread.is_alive()
    closing._wait()
    assert not thread.is_alive()


def test_criteria_of_the_caller_still_count(monkeypatch):
    monkeypatch.setattr(closing, "_ends", threading.Event())
    monkeypatch.setattr(closing.atexit, "register", lambda wait: None)
    model = Endless()
    closing.guard(model)

    def third(input_ids, scores):
        return torch.full((input_ids.shape[0],), model.tokens >= 3)

    closing._ends.set()
    model.generate(torch.zeros(2, 3, dtype=torch.long), stopping_criteria=[third])
    assert model.tokens == 3
