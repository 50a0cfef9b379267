"""Devices of a plan against those of the machine, and memory of weights that modules share."""

from __future__ import annotations

import pytest

from kt_sft.errors import ConfigError
from kt_sft.models.spec import find_experts
from kt_sft.placement import inject
from kt_sft.placement.budget import Run, memory_by_device
from kt_sft.placement.resolve import resolve
from kt_sft.placement.rules import parse_rules
from tests.helpers import rule_models


def plan_on(device: str):
    rule = {
        "match": {"name": "^(model|lm_head)$"},
        "replace": {"class": "default", "kwargs": {"generate_device": device}},
    }
    return resolve(rule_models.tiny("qwen3_moe"), parse_rules([rule], "r.yaml"))


@pytest.mark.parametrize(("number", "fits"), [(0, True), (1, True), (2, False), (7, False)])
def test_devices_are_counted_from_zero(monkeypatch, number, fits):
    monkeypatch.setattr(inject, "device_count", lambda kind: 2)
    if fits:
        inject.check_devices(plan_on(f"cuda:{number}"))
        return
    with pytest.raises(ConfigError, match=f"cuda:{number} .*this machine has 2 cuda devices"):
        inject.check_devices(plan_on(f"cuda:{number}"))


def test_a_tied_weight_is_counted_once():
    weights = []
    for is_tied in (False, True):
        model = rule_models.tiny("qwen3_moe", tie_word_embeddings=is_tied)
        specs = find_experts(model)
        run = Run(tokens=8, element_bytes=2, experts_per_token=2, vocabulary=model.config.vocab_size)
        memory = memory_by_device(model, resolve(model), specs, dict.fromkeys(specs, 0), run)
        weights.append(memory["cpu"].weights_bytes)
    assert weights[0] - weights[1] == 2 * model.get_input_embeddings().weight.numel()
