"""Every door that writes, where its target is a link, the source, a full disk, or has the longest name there is."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import Trainer, TrainingArguments
from transformers.utils import logging as hf_logging

import kt_sft
from kt_sft.adapters import forms
from kt_sft.config import KTConfig
from kt_sft.convert import plan
from kt_sft.errors import ConfigError, KTError, OutputError
from kt_sft.formats import disk, overwriting, staging
from kt_sft.formats.packed import PackedContainer
from kt_sft.integrations.llamafactory import exporting, saving
from kt_sft.integrations.merge.checkpoint import MergedCheckpoint
from kt_sft.integrations.merge.command import merge as merge_checkpoint
from kt_sft.integrations.transformers.base_model import find_base_model
from kt_sft.integrations.transformers.converting import convert_checkpoint
from kt_sft.integrations.transformers.opened import OpenedModel
from tests.helpers import adapters, kills, trainings

LONG = "n" * 255


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    adapters.make("qwen3_moe", root, sharded=True)
    return root


@pytest.fixture(scope="module")
def model(root):
    config = LoraConfig(r=2, target_modules="all", task_type="CAUSAL_LM")
    return kt_sft.get_peft_model(kt_sft.load_model(root / "base"), config)


@pytest.fixture
def without_bars():
    hf_logging.disable_progress_bar()
    yield
    hf_logging.enable_progress_bar()


def bar(what, total):
    return contextlib.nullcontext(lambda done, total, name: None)


def convert(root: Path, model, out: Path) -> None:
    convert_checkpoint(root / "base", out, KTConfig(method="INT8"), bar=bar)


def merge(root: Path, model, out: Path) -> None:
    merge_checkpoint(root / "base", [root / "adapter"], out, "hf", bar)


def merge_gguf(root: Path, model, out: Path) -> None:
    merge_checkpoint(root / "base", [root / "adapter"], out, "gguf-bf16", bar)


def export(root: Path, model, out: Path) -> None:
    merged = MergedCheckpoint(OpenedModel(root / "base"), [root / "adapter"])
    exporting.save_merged(merged, out, torch.bfloat16, 60_000)


def convert_adapter(root: Path, model, out: Path) -> None:
    forms.convert(forms.open_adapter(root / "adapter", find_base_model(root / "base")), "peft-0.19", out)


def save_adapter(root: Path, model, out: Path) -> None:
    model.save_pretrained(out)


def save_model(root: Path, model, out: Path) -> None:
    kt_sft.load_model(root / "base").save_pretrained(out)


DOORS = [convert, merge, merge_gguf, export, convert_adapter, save_adapter, save_model]
doors = pytest.mark.parametrize("write", DOORS, ids=lambda door: door.__name__)


@doors
def test_a_target_that_is_read_is_refused_or_replaced_whole(root, model, tmp_path, write):
    """A model or an adapter that lies in the target's place is not half written over, and a line says why."""
    copy = shutil.copytree(root, tmp_path / "copy")
    target = copy / ("adapter" if write is convert_adapter else "base")
    before = kills.tree(target)
    if write in (save_model, save_adapter):
        write(copy, model, target)  # goes there as asked, like transformers: nothing is read any more
        assert (target / "config.json").exists() and not list(copy.rglob(".kt_sft-*"))
        return
    if write is merge_gguf:
        write(copy, model, target)  # a file of its own beside the others
        assert before.items() <= kills.tree(target).items() and len(kills.tree(target)) == len(before) + 1
        return
    with pytest.raises(KTError) as caught:
        write(copy, model, target)
    assert "\n" not in str(caught.value) and kills.tree(target) == before and not list(copy.rglob(".kt_sft-*"))


@doors
def test_a_target_inside_the_source(root, model, tmp_path, write):
    copy = shutil.copytree(root, tmp_path / "copy")
    target = copy / ("adapter" if write is convert_adapter else "base") / "inside"
    before = kills.tree(target.parent)
    write(copy, model, target)
    assert before.items() <= kills.tree(target.parent).items() and target.is_dir()
    assert not any("inside/inside" in path for path in kills.tree(target.parent))


@doors
def test_a_name_of_255_bytes(root, model, tmp_path, write):
    write(root, model, tmp_path / LONG)
    assert os.listdir(tmp_path) == [LONG] and any((tmp_path / LONG).iterdir())


@doors
def test_a_full_disk_is_one_line_and_leaves_what_was_there(root, model, tmp_path, write):
    """No file may be longer than some bytes."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limit[1]))
    try:
        with pytest.raises(OutputError) as caught:
            write(root, model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert "\n" not in str(caught.value) and "File too large" in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "convert.lock"]


@pytest.mark.slow  # a run that is killed in it leaves a mounted disk
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@doors
def test_a_disk_that_is_really_full(root, model, tmp_path, write, monkeypatch):
    """Mounted in the target's place, and above it."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", place]
    if subprocess.run(options, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed")
    try:
        for target in (place / "out", place):
            with pytest.raises(OutputError, match="disk space") as caught:
                write(root, model, target)
            assert "\n" not in str(caught.value) and not os.listdir(place)
            with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left") as caught:
                for module in (disk, plan):
                    patch.setattr(module, "free_bytes", lambda folder: 1 << 60)
                write(root, model, target)
            assert "\n" not in str(caught.value) and not list(place.rglob("*"))
        subprocess.run(["mount", "-o", "remount,size=128m", place], check=True)
        write(root, model, place)
        write(root, model, place / "deep" / "out")
        assert not list(place.rglob(".kt_sft-*")) and any((place / "deep" / "out").iterdir())
    finally:
        subprocess.run(["umount", place], check=True)


def test_an_export_does_not_go_into_the_model_or_the_adapter(root):
    for source in ("base", "adapter"):
        with pytest.raises(ConfigError, match=r"export_dir: .* is read for the export; choose another"):
            export(root, None, root / source)


def test_stock_trainer_replaces_an_adapter_of_another_rank_in_one_step(root, tmp_path, monkeypatch):
    """Without LLaMA-Factory: transformers' own save_model."""
    ours = []
    real = overwriting.exchange
    monkeypatch.setattr(overwriting, "exchange", lambda one, other: ours.append(other) or real(one, other))
    for rank in (2, 3):
        config = LoraConfig(r=rank, target_modules="all", task_type="CAUSAL_LM")
        trained = kt_sft.get_peft_model(kt_sft.load_model(root / "base"), config)
        arguments = TrainingArguments(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True)
        Trainer(model=trained, args=arguments).save_model()
    assert ours == [tmp_path / "out"]
    kt_sft.load_adapter(kt_sft.load_model(root / "base"), tmp_path / "out")


def test_links_in_a_runs_folder_lead_nowhere(root, tmp_path):
    victim = tmp_path / "victim"
    (victim / "checkpoint-2").mkdir(parents=True)
    (victim / "checkpoint-2" / "only copy").touch()
    output = tmp_path / "out"
    output.mkdir()
    (output / saving.STAGING).symlink_to(victim)
    with trainings.patched():
        run = trainings.trainer(root / "base", output, max_steps=2)
        run.train()
        assert os.listdir(victim) == ["checkpoint-2"] and os.listdir(victim / "checkpoint-2") == ["only copy"]
        assert (output / "checkpoint-2" / "trainer_state.json").is_file()
        shutil.rmtree(output / "checkpoint-2")
        (output / "checkpoint-2").symlink_to(victim)
        (output / saving.STAGING).symlink_to(victim)
        saving.clean(output, removes=True)
        run._save_checkpoint(run.model, None)  # says so, and goes on
    assert os.listdir(victim) == ["checkpoint-2"] and os.listdir(victim / "checkpoint-2") == ["only copy"]
    assert (output / "checkpoint-2").is_symlink()


@pytest.mark.usefixtures("without_bars")
def test_progress_bars_that_are_switched_off(root, tmp_path):
    for _ in range(2):
        loaded = kt_sft.load_model(root / "base", KTConfig(method="INT8", weight_cache=tmp_path / "cache"))
    export(root, None, tmp_path / "export")
    loaded.save_pretrained(tmp_path / "saved")
    (folder,) = (tmp_path / "cache").iterdir()
    PackedContainer(folder).close()


def test_the_next_run_removes_what_killed_ones_have_left(root, model, tmp_path):
    """Of every door that makes something new, whatever it wrote."""
    for write in (merge, convert_adapter, save_adapter, save_model, export):
        place = tmp_path / write.__name__
        place.mkdir()
        left = place / ".kt_sft-00112233445566ff"
        left.mkdir()
        (left / "half.safetensors").write_text("half")
        (left / staging._LOCK).touch()
        write(root, model, place / "out")
        assert os.listdir(place) == ["out"], write.__name__
