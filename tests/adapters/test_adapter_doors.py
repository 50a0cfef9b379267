"""Every kind of adapter through every door: what comes out computes the same as stock PEFT, or the door refuses.

The table of docs/adapters.md is this one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import kt_sft
from kt_sft.adapters import forms
from kt_sft.adapters.kinds import FORMS, KINDS, kinds_of
from kt_sft.errors import KTError
from kt_sft.integrations.llamafactory import exporting
from kt_sft.integrations.merge.command import merge
from kt_sft.integrations.merge.inspecting import open_with_base
from tests.helpers import adapter_kinds, parity, tiny_models
from tests.helpers.adapter_kinds import CASES

IDS = tiny_models.token_ids(2, 12)
# Of what the adapter changes: experts in bf16, and what a GGUF file in bf16 rounds.
ROUNDED, EXACT = 0.06, 1e-4
REFUSED = {  # beside what KINDS says
    ("lora_bias_alone", "merge hf"): "cannot be merged",
    ("lora_bias_alone", "merge gguf"): "cannot be merged",
    ("lora_bias_alone", "export"): "cannot be merged",
    ("lora_bias_alone", "load, merge, save"): "base layer has no bias",
    ("bias", "merge gguf"): "an unknown one",  # llama.cpp's Qwen3-MoE has no biases
    ("lora_bias", "merge gguf"): "an unknown one",
}


@contextlib.contextmanager
def quiet(what: str, total: int) -> Iterator[Callable[[int, int, str], None]]:
    yield lambda *_: None


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("kinds")


@torch.no_grad()
def load(folder: Path, adapter: Path) -> Tensor:
    return kt_sft.load_adapter(parity.load_ours(folder), adapter)(IDS).logits


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    return tiny_models.load_stock(folder)(IDS).logits


def merge_hf(folder: Path, adapter: Path, out: Path) -> Tensor:
    return logits(merge(folder, [adapter], out, "hf", quiet))


@torch.no_grad()
def merge_gguf(folder: Path, adapter: Path, out: Path) -> Tensor:
    file = merge(folder, [adapter], out.with_suffix(".gguf"), "gguf-bf16", quiet)
    config = kt_sft.KTConfig(threads=1, weight_cache=str(out))
    return kt_sft.load_model(file, config, dtype=torch.float32).eval()(IDS).logits


def export(folder: Path, adapter: Path, out: Path) -> Tensor:
    args = SimpleNamespace(model_name_or_path=str(folder), adapter_name_or_path=[str(adapter)], adapter_folder=None)
    exporting.save_merged(exporting.open_merged(args), out, torch.float32, 60_000)
    return logits(out)


def load_merge_save(folder: Path, adapter: Path, out: Path) -> Tensor:
    """What `llamafactory-cli export` does where it cannot merge file by file."""
    kt_sft.load_adapter(parity.load_ours(folder), adapter).merge_and_unload().save_pretrained(out)
    return logits(out)


WRITING = {
    "merge hf": (merge_hf, EXACT),
    "merge gguf": (merge_gguf, ROUNDED),
    "export": (export, EXACT),
    "load, merge, save": (load_merge_save, 0.01),
}


def refusals(name: str, door: str) -> list[str]:
    """What a door's refusal may say; none if it does not refuse."""
    if door in FORMS:
        return [KINDS[kind].title for kind in CASES[name].kinds if door not in KINDS[kind].forms]
    return [REFUSED[name, door]] if (name, door) in REFUSED else []


@pytest.mark.parametrize("name", CASES)
def test_every_kind_through_every_door(root, name, tmp_path):
    folder, adapter = adapter_kinds.make(name, root)
    wanted = adapter_kinds.truth(name, folder, adapter, IDS)
    effect = (wanted - logits(folder)).norm()
    assert effect > 0.1 * wanted.norm(), "an adapter that would not be missed"
    found = kinds_of(open_with_base(adapter, str(folder)))
    assert {*found, "linear"} == {*CASES[name].kinds, "linear"}

    def check(door: str, bound: float, run: Callable[[], Tensor]) -> None:
        refused = refusals(name, door)
        if refused:
            with pytest.raises((KTError, RuntimeError)) as caught:
                run()
            text = str(caught.value)
            assert any(words in text for words in refused) and "\n" not in text, f"{door}: {text}"
            return
        error = float((run() - wanted).norm() / effect)
        assert error < bound, f"{door}: {error:.2e}"

    check("load", ROUNDED, lambda: load(folder, adapter))
    for door, (run, bound) in WRITING.items():
        check(door, bound, lambda run=run, door=door: run(folder, adapter, tmp_path / door.replace(" ", "-")))
    for form in FORMS:
        convert = lambda form=form: forms.convert(open_with_base(adapter, str(folder)), form, tmp_path / form)  # noqa: E731
        check(form, ROUNDED, lambda convert=convert: load(folder, convert()))
