"""The adapter at the end of a run whose output directory cannot be written: whole, in the first other place."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import LoraConfig

import kt_sft
from kt_sft.errors import OutputError
from kt_sft.integrations.llamafactory import disk
from tests.helpers import tiny_models


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("rescue")


@pytest.fixture(scope="module")
def model(root):
    config = LoraConfig(r=2, target_modules="all", task_type="CAUSAL_LM")
    return kt_sft.get_peft_model(kt_sft.load_model(tiny_models.build("qwen3_moe", root / "base")), config)


@pytest.fixture
def trainer(model, tmp_path, monkeypatch):
    """Its output directory, and that above it, are below a file."""
    (tmp_path / "file").write_text("")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return SimpleNamespace(model=model, args=SimpleNamespace(output_dir=str(tmp_path / "file/a/run"), should_save=True))


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_adapter_goes_to_the_first_place_that_takes_it(trainer, root, tmp_path):
    with pytest.raises(OutputError, match="No space left on device; the adapter is in") as caught:
        disk.save_or_rescue(trainer, full)
    (folder,) = (tmp_path / "here").iterdir()
    assert str(folder) in str(caught.value) and folder.name.startswith("run-adapter-")
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask()
    kt_sft.load_adapter(kt_sft.load_model(root / "base"), folder)


def test_a_place_that_fills_up_keeps_nothing_of_it(trainer, tmp_path, monkeypatch):
    saved = type(trainer.model).save_pretrained
    tried = []

    def save(self, folder, *args, **kwargs):
        tried.append(Path(folder))
        saved(self, folder, *args, **kwargs)
        if len(tried) == 1:
            full()

    monkeypatch.setattr(type(trainer.model), "save_pretrained", save)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(OutputError, match="the adapter is in"):
        disk.save_or_rescue(trainer, full)
    assert len(tried) == 2 and not list((tmp_path / "here").iterdir())
    (folder,) = (tmp_path / "home").iterdir()
    assert (folder / "adapter_config.json").is_file()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
