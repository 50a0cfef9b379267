"""A config.json that no model can be built of: one line from every command that reads it, and no question."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from kt_sft.cli import app
from tests.helpers import adapters, small_thinker


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    adapters.make("qwen3_moe", root)
    return root


def edited(change):
    """The text of config.json after `change` of its values."""

    def apply(text: str) -> str:
        values = json.loads(text)
        change(values)
        return json.dumps(values)

    return apply


REMOTE = {"AutoConfig": "x.Config", "AutoModelForCausalLM": "x.Model"}
FAULTS = {
    "unknown type": (edited(lambda v: v.update(model_type="foo_moe")), "known model, found .*foo_moe"),
    "no type": (edited(lambda v: (v.pop("model_type"), v.pop("architectures"))), "known model, found Unrecognized"),
    "wrong type of a field": (edited(lambda v: v.update(hidden_size="many")), "hidden_size: expected a whole number"),
    "impossible size": (edited(lambda v: v.update(hidden_size=-8)), "hidden_size: expected a whole number"),
    "type of a field that transformers checks": (
        edited(lambda v: v.update(max_window_layers="x")),
        "max_window_layers: expected a whole number",
    ),
    "own code": (
        edited(lambda v: v.update(model_type="foo_moe", auto_map=REMOTE)),
        "allow the code beside it with --trust-remote-code",
    ),
    "cut off": (lambda text: text[:40], "config: expected a JSON object, found Unterminated"),
    "no object": (lambda text: "[]", "config: expected a JSON object, found a JSON list"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_line_from_every_command(root, fault, tmp_path):
    change, match = FAULTS[fault]
    file = root / "base" / "config.json"
    text = file.read_text()
    commands = [
        ["convert", "--input-path", root / "base", "--output", tmp_path / "out"],
        ["merge", "--model", root / "base", "--adapter", root / "adapter", "--output", tmp_path / "out"],
        ["adapter", "convert", "--to", "gguf", root / "adapter", tmp_path / "out.gguf"],
        ["adapter", "inspect", "--base-model", root / "base", root / "adapter"],
    ]
    try:
        file.write_text(change(text))
        for words in commands:
            result = CliRunner().invoke(app, list(map(str, words)))
            assert result.exit_code == 2, result.output
            assert len(result.output.strip().splitlines()) == 1
            assert re.search(match, result.output), result.output
    finally:
        file.write_text(text)
    assert not any(tmp_path.iterdir())


def test_own_code_runs_where_it_is_trusted(tmp_path):
    model = small_thinker.build(tmp_path / "model", apply_softmax=True)
    words = ["convert", "--input-path", model, "--output", tmp_path / "out", "--threads", "1"]
    refused = CliRunner().invoke(app, list(map(str, words)))
    assert refused.exit_code == 2 and "--trust-remote-code" in refused.output
    done = CliRunner().invoke(app, [*map(str, words), "--trust-remote-code"])
    assert done.exit_code == 0 and "written" in done.output, done.output
