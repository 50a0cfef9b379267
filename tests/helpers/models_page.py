"""Writes docs/models.md from the results of the parity test: `python -m tests.helpers.models_page`."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from kt_sft.formats.staging import write_text
from kt_sft.models.auto_class import auto_class
from kt_sft.models.expert_keys import KeyMap
from kt_sft.models.families import family_of
from kt_sft.models.spec import find_experts
from tests.helpers import families, tiny_models

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
TEST = "tests/models/test_families.py"
REMOTE_TEST = "tests/models/test_small_thinker.py"
KEYWORDS = "match_plain_peft or match_float64"
PASSES = "passes"
# Decorated experts classes that no family of the test reaches, and why.
UNREACHED = {
    "NemotronHExperts": "no gate: up, squared ReLU, down. Refused: `expected gate and up projections, found no gate`",
    "OpenAIPrivacyFilterExperts": "a token classifier, not a language model. Refused: `expected no bias, found a bias`",
    "Qwen3OmniMoeTalkerTextExperts": "writes speech codes; the thinker, which reads and writes text, is in the table",
}
REMOTE = (
    "Remote code: SmallThinker (`small_thinker.py`: one module per expert, gated by ReLU, routed before attention), "
    "`trust_remote_code=True`. `{test}` checks it with a tiny model of its structure, since its own modeling file asks "
    "for transformers 4.53; adapters of its experts have the fused form of all other families."
)
OTHERS = (
    "Families whose experts transformers keeps outside of its experts interface (aria, dbrx, doge, granitemoe and its "
    "relatives, jetmoe, longcat_flash, nllb_moe, switch_transformers) and models without experts are refused by name: "
    "`expected a mixture-of-experts model on transformers' experts interface, found no routed experts`."
)
HEADER = """# Models

Written by `python -m tests.helpers.models_page` from the results of `{test}`; do not edit.

A family is in this table if a tiny random model of it, saved by transformers, loads with its experts in the kernels and
gives the logits, the gradients of every LoRA factor (experts included), of the routers and of the embedding that plain
transformers and PEFT give in float64, within a bound computed from the kernels' roundings. Checkpoints are read with
the keys that transformers saves and hubs hold (*keys*), and with the module's fused 3-D tensors.

| family (`model_type`) | class in transformers | experts | gate | keys | described by | parity |
|---|---|---|---|---|---|---|
"""


def on_meta(config: Any) -> nn.Module:
    """A model without weights."""
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def row(family: str, status: str) -> str:
    """One line of the table."""
    model = on_meta(tiny_models.config(family))
    specs = find_experts(model)
    name, spec = next(iter(specs.items()))
    experts = model.get_submodule(name)
    own = family_of(experts)
    where = f"`{own.__name__.rpartition('.')[2]}.py`" if own else "generic"
    where = "`kimi_k2.py`, generic" if family == "kimi_k2" else where
    gate = spec.activation.replace("_", " ") + (", biases" if spec.has_bias else "")
    cells = (family, families.FAMILIES[family].model_class, type(experts).__name__, gate, keys(model, specs), where)
    return f"| {' | '.join(cells)} | {status} |\n"


def keys(model: nn.Module, specs: dict[str, Any]) -> str:
    """How checkpoints of the family name one expert's weights."""
    name, spec = next(iter(specs.items()))
    patterns = [p for p in KeyMap(model, specs)._by_pattern if "experts" in p]
    single = {p.removesuffix(".weight").rpartition(".")[2] for p in patterns if "*" in p}
    if single:
        names = [name for name in ("gate_proj", "up_proj", "down_proj", "w1", "w3", "w2") if name in single]
        assert single == set(names)
        return f"`experts.*.` {', '.join(names)}"
    if patterns:
        return "fused, `[in, out]` or `[out, in]`"
    return "fused, `[in, out]`" if spec.is_transposed else "fused, `[out, in]`"


def decorated_classes() -> set[str]:
    """Every class of the installed transformers that carries the experts interface."""
    found = set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        found.update(re.findall(r"^@use_experts_implementation[^\n]*\nclass (\w+)", text, re.MULTILINE))
    return found


def render(results: dict[str, str]) -> str:
    """The page for results by family."""
    passed = sum(status == PASSES for status in results.values())
    page = HEADER.format(test=TEST) + "".join(row(family, results[family]) for family in sorted(results))
    page += f"\n{passed} of {len(results)} families pass.\n\n{REMOTE.format(test=REMOTE_TEST)}\n\n## Not supported\n\n"
    page += "".join(f"- `{name}`: {why}.\n" for name, why in sorted(UNREACHED.items()))
    page += f"\n{OTHERS}\n\nHow a family that deviates is added: [adding_a_model.md](adding_a_model.md).\n"
    return page


def measure() -> dict[str, str]:
    """Runs the parity test; outcome by family."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = ["-k", KEYWORDS, TEST, REMOTE_TEST]
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *tests]
        subprocess.run(command, cwd=PAGE.parents[1], check=False)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        results = {}
        for case in cases:
            if REMOTE_TEST.removesuffix(".py").replace("/", ".") in case.attrib["classname"]:
                assert case.find("failure") is None, "the page says that this test passes"
                continue
            family = re.search(r"\[(\w+)\]", case.attrib["name"])
            if family is not None:
                results[family[1]] = "fails" if case.find("failure") is not None else PASSES
    return {family: results.get(family, "did not run") for family in families.FAMILIES}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    write_text(PAGE, render(measure()))
    logging.info("wrote %s", PAGE.name)
