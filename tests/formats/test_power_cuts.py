"""No name is given before what it names is on the disk, and no writer returns before the name is: every writer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

import kt_sft
from kt_sft.adapters import forms
from kt_sft.config import KTConfig
from kt_sft.convert.run import convert
from kt_sft.formats import overwriting, staging
from kt_sft.formats.gguf import GgufIndex
from kt_sft.integrations.gguf import model as gguf_model
from kt_sft.integrations.llamafactory import exporting
from kt_sft.integrations.merge.checkpoint import MergedCheckpoint
from kt_sft.integrations.merge.command import merge as merge_checkpoint
from kt_sft.integrations.transformers.base_model import find_base_model
from kt_sft.integrations.transformers.opened import OpenedModel
from scripts.demo.tiny_moe import checkpoint
from tests.helpers import adapters, gguf_models, power, tiny_models, trainings
from tests.helpers.containers import RandomExperts, plan_for


@pytest.fixture(scope="module", autouse=True)
def methods():
    with trainings.patched():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model in `base`, an adapter of it in `adapter`, one of another rank in `other`."""
    root = tmp_path_factory.mktemp("root")
    adapters.make("qwen3_moe", root, sharded=True)
    config = LoraConfig(r=2, target_modules="all", task_type="CAUSAL_LM")
    kt_sft.get_peft_model(kt_sft.load_model(root / "base"), config).save_pretrained(root / "other")
    gguf_models.write_model(tiny_models.build("mixtral", root / "mixtral"), root / "model.gguf")
    return root


def bar(what, total):
    return contextlib.nullcontext(lambda done, total, name: None)


def write_container(root: Path, out: Path) -> None:
    source = RandomExperts(out / "source")
    convert(source, plan_for(source, out / "deep" / "packed", "bf16"))
    convert(source, plan_for(source, out / "deep" / "packed"), overwrite=True)


def write_cache(root: Path, out: Path) -> None:
    kt_sft.load_model(root / "base", KTConfig(method="INT8", weight_cache=out / "deep" / "cache"))


def merge(root: Path, out: Path) -> None:
    merge_checkpoint(root / "base", [root / "adapter"], out / "deep" / "merged", "hf", bar)
    merge_checkpoint(root / "base", [root / "adapter"], out / "merged.gguf", "gguf-q8_0", bar)


def convert_adapter(root: Path, out: Path) -> None:
    adapter = forms.open_adapter(root / "adapter", find_base_model(root / "base"))
    forms.convert(adapter, "peft-0.19", out / "deep" / "peft")
    forms.convert(adapter, "gguf", out / "adapter.gguf")


def save_adapter(root: Path, out: Path) -> None:
    """A new one, one over it that fits the same config, one that does not, and one beside another name."""
    config = LoraConfig(r=3, lora_alpha=5, target_modules="all", task_type="CAUSAL_LM")
    model = kt_sft.get_peft_model(kt_sft.load_model(root / "base"), config)
    model.save_pretrained(out / "deep" / "adapter")
    adapters.randomise(model, 3)
    model.save_pretrained(out / "deep" / "adapter")
    shutil.copytree(root / "other", out / "other")
    model.save_pretrained(out / "other")


def save_without_exchange(root: Path, out: Path) -> None:
    before, overwriting.exchange = overwriting.exchange, lambda one, other: False
    try:
        save_adapter(root, out)
    finally:
        overwriting.exchange = before


def save_model(root: Path, out: Path) -> None:
    model = kt_sft.load_model(root / "base")
    model.save_pretrained(out / "model", max_shard_size="30KB")
    model.save_pretrained(out / "model")


def export(root: Path, out: Path) -> None:
    merged = MergedCheckpoint(OpenedModel(root / "base"), [root / "adapter"])
    exporting.save_merged(merged, out / "export", torch.bfloat16, 60_000)
    exporting.save_merged(merged, out / "export", torch.float32, 1 << 30)


def train(root: Path, out: Path) -> None:
    run = trainings.trainer(root / "base", out / "run", save_total_limit=1)
    run.train()
    run._save_checkpoint(run.model, None)  # over the one of its name
    run.save_model()


def read_gguf_model(root: Path, out: Path) -> None:
    gguf_model.model_directory(GgufIndex.from_path(root / "model.gguf"), out / "cache")


def write_report(root: Path, out: Path) -> None:
    for text in ("{}", "[]"):
        staging.write_text(out / "deep" / "report.json", text)


def write_demo(root: Path, out: Path) -> None:
    for number in range(2):
        with checkpoint.whole_folder(out / "demo") as folder:
            checkpoint.write_weights(folder, iter({"w": torch.full((4,), number)}.items()), torch.float32)
            checkpoint.write_manifest(folder, {"number": number})


WRITERS = [
    write_container, write_cache, merge, convert_adapter, save_adapter, save_without_exchange, save_model, export,
    train, read_gguf_model, write_report, write_demo,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_names_come_after_data_and_are_flushed(root, tmp_path, write):
    before = os.umask(0o027)
    try:
        with power.recorded() as recorder:
            write(root, tmp_path)
    finally:
        os.umask(before)
    assert recorder.renames and not recorder.faults and not recorder.unflushed()
    assert not list(tmp_path.rglob(".kt_sft-*")) and not list(tmp_path.rglob("*.part"))
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if "source" not in path.parts}
    strange = {str(p): oct(m) for p, m in modes.items() if m not in ((0o750, 0o755) if p.is_dir() else (0o640, 0o644))}
    assert not strange, strange


def test_the_recorder_sees_what_is_not_flushed(tmp_path):
    (tmp_path / "x").write_text("1")
    with power.recorded() as recorder:
        os.replace(tmp_path / "x", tmp_path / "y")
    assert len(recorder.faults) == 1 and len(recorder.unflushed()) == 1
    with power.recorded() as recorder:
        staging.flush(tmp_path)
        (tmp_path / "y").write_text(json.dumps("written after it was flushed"))
        os.replace(tmp_path / "y", tmp_path / "x")
        staging.sync_folder(tmp_path)
    assert len(recorder.faults) == 1 and not recorder.unflushed()
