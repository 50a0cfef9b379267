"""What leaves, opened by those it is for: PEFT 0.19 and llama.cpp, installed beside this environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kt_sft
from kt_sft import KTConfig
from kt_sft.adapters import forms
from tests.adapters.test_adapters import opened
from tests.helpers import adapters, other_releases, tiny_models
from tests.integrations.merge.test_merging import SIZES, add_tokenizer, merge

pytestmark = pytest.mark.slow
FAMILIES = (*tiny_models.FAMILIES, "gpt_oss")
PEFT_LOGITS = """
import sys, peft, torch
from tests.helpers import tiny_models
base, adapter, out = sys.argv[1:]
assert peft.__version__.startswith("0.19."), peft.__version__
model = peft.PeftModel.from_pretrained(tiny_models.load_stock(base), adapter).eval()
torch.save(model(tiny_models.token_ids()).logits.detach(), out)
"""


@pytest.fixture(scope="module")
def peft_0_19(tmp_path_factory) -> Path:
    """With the transformers that it goes with: later ones have no `distributed_operation` for it to copy."""
    return other_releases.install(tmp_path_factory.mktemp("peft"), "peft==0.19.1", "transformers==5.5.4")


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory) -> Path:
    return other_releases.install(tmp_path_factory.mktemp("llama_cpp"), "xllamacpp==2026.10.11549")


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_0_19_computes_the_same(peft_0_19, tmp_path, family):
    adapters.make(family, tmp_path)
    folder = forms.convert(opened(tmp_path / "adapter", tmp_path), "peft-0.19", tmp_path / "converted")
    other_releases.run(peft_0_19, tmp_path / "base", folder, tmp_path / "logits.pt", code=PEFT_LOGITS)
    ids = tiny_models.token_ids()
    wanted, found = adapters.peft_model(tmp_path)(ids).logits, torch.load(tmp_path / "logits.pt")
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def llama_logprobs(llama_cpp: Path, model: Path, adapter: Path | str, prompts: list[list[int]]) -> torch.Tensor:
    """Of the next token after each prompt, `[prompts, vocab]`."""
    out, program = model.with_suffix(".json"), other_releases.ROOT / "tests" / "helpers" / "llama_cpp_logprobs.py"
    other_releases.run(llama_cpp, program, model, adapter, out, json.dumps(prompts))
    answers = json.loads(out.read_text())
    return torch.tensor([[answer[str(token)] for token in range(len(answer))] for answer in answers])


@pytest.mark.parametrize("family", SIZES)
def test_llama_cpp_computes_the_same(llama_cpp, tmp_path, family):
    """Merged files of both types, and the base with the GGUF adapter.

    llama.cpp rounds activations to the weights' type, bf16 or blocks of int8, so the bound is on the distance relative
    to what the adapter changes: 2^-8 and 2^-7 per product, four- and eightfold over a network of ten products in a
    row. What Q8_0 itself rounds shows in neither: the reference computes with the weights of the same file.
    """
    targets = ["mlp.experts", "o_proj", "gate_proj", "up_proj"] if family.startswith("deepseek") else "all"
    adapters.make(family, tmp_path, targets=targets, **SIZES[family])
    add_tokenizer(tmp_path / "base")
    ids = tiny_models.token_ids(1, 9)
    prompts, rows = [ids[0, :count].tolist() for count in (1, 2, 5, 9)], [0, 1, 4, 8]

    def logprobs(model) -> torch.Tensor:
        return model(ids).logits[0].detach().log_softmax(-1)[rows]

    base, wanted = logprobs(tiny_models.load_stock(tmp_path / "base")), logprobs(adapters.peft_model(tmp_path))
    alone = merge(tmp_path, tmp_path / "base.gguf", "gguf-bf16", untouched(tmp_path))
    adapter = forms.convert(opened(tmp_path / "adapter", tmp_path), "gguf", tmp_path / "adapter.gguf")
    rounded = merge(tmp_path, tmp_path / "q8_0.gguf", "gguf-q8_0")
    ours = logprobs(kt_sft.load_model(rounded, KTConfig(weight_cache=str(tmp_path / "cache")), dtype=torch.float32))
    cases = [
        (alone, "-", base, 2**-6),
        (alone, adapter, wanted, 2**-6),
        (merge(tmp_path, tmp_path / "bf16.gguf", "gguf-bf16"), "-", wanted, 2**-6),
        (rounded, "-", ours, 2**-4),
    ]
    for model, with_adapter, expected, bound in cases:
        found = llama_logprobs(llama_cpp, model, with_adapter, prompts)
        distance = (found - expected).norm() / (base - wanted).norm()
        assert distance < bound, f"{model.name} with {with_adapter}: {distance:.4f}"


def untouched(root: Path) -> Path:
    """An adapter that changes nothing: its second factors are zero."""
    adapters.zeroed(root / "adapter", root / "zeroed")
    return root / "zeroed"
