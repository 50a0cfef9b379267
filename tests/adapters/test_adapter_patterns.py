"""Keys of rank_pattern are found as PEFT finds them, however many there are; endless expressions are seen."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from peft.utils.other import get_pattern_key

from kt_sft.adapters.patterns import Patterns, check_speed
from kt_sft.errors import FormatError

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.experts.gate_up_proj", "mlp.gate", "mlp.experts.3.w1")
NAMES = [f"model.layers.{layer}.{part}" for layer in range(12) for part in PARTS]
KEYS = [
    "q_proj", r"q\.proj", "q.proj", "self_attn.q_proj", r"layers\.3\.self_attn\.k_proj", "layers.1.mlp.gate", "w1", "x",
    r"mlp\.experts\.\d+\.w[123]", "experts.gate_up_proj", "model.layers.11.mlp.gate", r"(\w+)_proj", "mlp_gate",
    "layers.1.+gate", "mlp.gat.", r"self_attn\.q_proj(\.weight)?", "gate|q_proj", "",
]  # fmt: skip
ENDLESS = [r"(.*)*x", r"(\w+\.?)+!", "((.{1,60}){1,60}){1,60}x", "(?:" * 20 + "." + "*)" * 20 + "x"]
QUICK = [r".*layers\.0\.(q|k)_proj", "(?!.*visual).*proj", r".*\.(self_attn|mlp)\..*", "(a|a)" * 30 + "b", "q_proj"]


def test_keys_are_those_of_peft():
    generator = random.Random(1)
    for _ in range(1500):
        keys = generator.sample(KEYS, generator.randint(1, 9))
        patterns = Patterns({key: place for place, key in enumerate(keys)})
        for name in generator.sample(NAMES, 4):
            found = patterns.key_of(name)
            assert (name if found is None else found) == get_pattern_key(keys, name), (keys, name)


def test_many_keys_cost_little():
    patterns = Patterns({f"model.layers.{layer}.self_attn.q_proj": layer for layer in range(20_000)})
    began = time.process_time()
    found = [patterns.key_of(name) for name in NAMES]
    assert time.process_time() - began < 2
    assert [patterns[key] for key in found if key is not None] == list(range(12))


@pytest.mark.parametrize("expression", ENDLESS)
def test_an_endless_expression_is_seen_in_time(expression):
    for config in ({"target_modules": expression}, {"exclude_modules": expression}, {"rank_pattern": {expression: 3}}):
        began = time.process_time()
        with pytest.raises(FormatError, match=rf"^file: {next(iter(config))}.*matched with the model's names"):
            check_speed(config, NAMES, Path("file"))
        assert time.process_time() - began < 1  # of this process; the other one has its own limit


@pytest.mark.parametrize("expression", QUICK)
def test_others_pass(expression):
    check_speed({"target_modules": expression, "alpha_pattern": {expression: 4}}, NAMES, Path("file"))


def test_a_list_of_names_starts_no_process(monkeypatch):
    monkeypatch.setattr("subprocess.run", None)
    names = {"target_modules": ["q_proj", "(.*)*x"], "rank_pattern": {r"layers\.1\.self_attn\.q_proj(\.weight)?": 4}}
    check_speed(names, NAMES, Path("file"))
