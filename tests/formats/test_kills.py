"""SIGKILL at any moment of writing: the old thing or the new one is there, whole, and the next run works.

The long form kills each writer 100 times: `-m slow -s -k kills`; each prints its seed.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers.utils import logging as hf_logging

import kt_sft
from kt_sft.config import KTConfig
from kt_sft.convert.run import convert
from kt_sft.formats import overwriting, staging, training_checkpoint
from kt_sft.formats.packed import MANIFEST_NAME, PackedContainer
from kt_sft.integrations.llamafactory import resuming, saving
from kt_sft.integrations.merge.command import merge
from tests.helpers import adapters, kills, tiny_models, trainings
from tests.helpers.containers import RandomExperts, blobs_of, plan_for

SEED = 20250
COUNTS = [6, pytest.param(100, marks=pytest.mark.slow)]


def bar(what, total):
    return contextlib.nullcontext(lambda done, total, name: None)


def holders(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".kt_sft-*")]


class Conversion:
    """An overwrite of a container of other weights."""

    states = {"old", "new"}

    def __init__(self, root: Path):
        self.out, self.pristine = root / "out", root / "old"
        self.source = RandomExperts(root / "source", seed=1)
        old = RandomExperts(root / "older", seed=0)
        convert(old, plan_for(old, self.pristine, "bf16"))
        convert(self.source, plan_for(self.source, root / "new"))
        self.old, self.new = blobs_of(self.pristine), blobs_of(root / "new")

    def prepare(self):
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.pristine, self.out)

    def write(self):
        convert(self.source, plan_for(self.source, self.out), overwrite=True)

    def check(self):
        found = blobs_of(self.out)
        assert found in (self.old, self.new)
        self.write()
        assert blobs_of(self.out) == self.new and len(list(self.out.iterdir())) == 4  # and the lock
        return "old" if found == self.old else "new"


class Merge:
    """A merged checkpoint under a new name."""

    states = {"nothing", "new"}

    def __init__(self, root: Path):
        self.root, self.out = root, root / "to" / "merged"
        self.adapter = adapters.make("qwen3_moe", root, sharded=True)
        (root / "to").mkdir()
        self.write()
        self.new = kills.tree(self.out)

    def prepare(self):
        shutil.rmtree(self.root / "to")
        (self.root / "to").mkdir()

    def write(self):
        merge(self.root / "base", [self.adapter], self.out, "hf", bar)

    def check(self):
        was_there = self.out.exists()
        if was_there:
            assert kills.tree(self.out) == self.new
            shutil.rmtree(self.out)
        self.write()
        assert kills.tree(self.out) == self.new and not holders(self.root)
        return "new" if was_there else "nothing"


class AdapterSave:
    """An adapter over one of another rank, in a folder that holds a checkpoint, too."""

    states = {"old", "new"}

    def __init__(self, root: Path):
        base = tiny_models.build("qwen3_moe", root / "base")
        self.parent, self.out, self.pristine = root / "to", root / "to" / "adapter", root / "old"
        old = kt_sft.get_peft_model(kt_sft.load_model(base), LoraConfig(r=2, target_modules="all"))
        old.save_pretrained(self.pristine)
        (self.pristine / "checkpoint-1").mkdir()
        (self.pristine / "checkpoint-1" / "x").write_text("kept")
        self.model = kt_sft.get_peft_model(kt_sft.load_model(base), LoraConfig(r=3, target_modules="all"))
        adapters.randomise(self.model, 7)
        shutil.copytree(self.pristine, self.out)
        self.write()
        self.old, self.new = self.loaded(self.pristine), self.loaded(self.out)
        assert self.old["adapter_config.json"] != self.new["adapter_config.json"]

    @staticmethod
    def loaded(folder: Path) -> dict[str, bytes]:
        return {k: v for k, v in kills.tree(folder).items() if not k.startswith(("README.md", ".kt_sft-"))}

    def prepare(self):
        shutil.rmtree(self.parent)
        shutil.copytree(self.pristine, self.out)

    def write(self):
        self.model.save_pretrained(self.out)

    def check(self):
        found = self.loaded(self.out)
        assert found in (self.old, self.new)
        self.write()
        assert self.loaded(self.out) == self.new and not holders(self.parent)
        return "old" if found == self.old else "new"


class TrainerSave(AdapterSave):
    """The same by the trainer's own call, with LLaMA-Factory's hook."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.trainer = trainings.Trainer(
            model=self.model,
            args=trainings.TrainingArguments(output_dir=str(self.out), report_to="none", use_cpu=True),
        )
        self.write()
        self.new = self.loaded(self.out)

    @staticmethod
    def loaded(folder: Path) -> dict[str, bytes]:
        return {k: v for k, v in AdapterSave.loaded(folder).items() if k != "training_args.bin"}

    def write(self):
        if hasattr(self, "trainer"):
            self.trainer.save_model()
        else:
            super().write()


class CheckpointSave:
    """A training's checkpoint, over a damaged one of its name, beside an older one."""

    states = {"old", "new"}

    def __init__(self, root: Path):
        base = trainings.base_model(root)
        self.out, self.pristine = root / "to" / "out", root / "old"
        self.make = lambda: trainings.trainer(base, self.out)
        self.run = self.make()
        self.run.train()
        shutil.copytree(self.out, self.pristine)
        shutil.rmtree(self.pristine / "checkpoint-6")

    def prepare(self):
        shutil.rmtree(self.out.parent)
        shutil.copytree(self.pristine, self.out)

    def write(self):
        self.run._save_checkpoint(self.run.model, None)

    def check(self):
        found, broken = training_checkpoint.newest_whole(self.out)
        assert not broken and found.name in ("checkpoint-4", "checkpoint-6")
        saving.clean(self.out, removes=True)
        found, broken = training_checkpoint.newest_whole(self.out)
        assert not broken and not (self.out / saving.STAGING).exists() and not holders(self.out.parent)
        state = "old" if found.name == "checkpoint-4" else "new"

        def resume():
            assert resuming.last_checkpoint(self.out) == found
            self.make().train(resume_from_checkpoint=str(found))

        if state == "old":
            kills.forked(resume)
            assert training_checkpoint.newest_whole(self.out)[0].name == "checkpoint-6"
        return state


class CacheWrite:
    """The container that the first load of a checkpoint leaves."""

    states = {"nothing", "new"}

    def __init__(self, root: Path):
        self.base = tiny_models.build("qwen3_moe", root / "base")
        self.cache = root / "to" / "cache"
        self.ids = torch.arange(3, 15).reshape(2, 6)
        with torch.no_grad():
            self.expected = kt_sft.load_model(self.base, KTConfig(method="INT8")).eval()(self.ids).logits
        self.write()
        (self.folder,) = self.cache.iterdir()
        self.new = blobs_of(self.folder)

    def prepare(self):
        shutil.rmtree(self.cache.parent, ignore_errors=True)

    def write(self):
        return kt_sft.load_model(self.base, KTConfig(method="INT8", weight_cache=self.cache))

    def check(self):
        is_whole = (self.folder / MANIFEST_NAME).exists()
        if is_whole:
            assert blobs_of(self.folder) == self.new
        with torch.no_grad():
            assert torch.equal(self.write().eval()(self.ids).logits, self.expected)
        assert blobs_of(self.folder) == self.new
        with PackedContainer(self.folder) as container:
            layers = len(container.manifest.layers)
        assert len(list(self.folder.iterdir())) == layers + 2
        return "new" if is_whole else "nothing"


WRITERS = [Conversion, Merge, AdapterSave, TrainerSave, CheckpointSave, CacheWrite]


@pytest.fixture(scope="module", autouse=True)
def methods():
    """Without bars: processes share their lock, and a child may be killed while it has it."""
    hf_logging.disable_progress_bar()
    try:
        with trainings.patched():
            yield
    finally:
        hf_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    return functools.cache(lambda kind: kind(tmp_path_factory.mktemp(kind.__name__)))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", WRITERS, ids=lambda kind: kind.__name__)
def test_kills_at_random_moments(writers, kind, count):
    writer = writers(kind)
    found = kills.at_random(writer.prepare, writer.write, writer.check, count=count, seed=SEED + count)
    assert set(found) <= {*writer.states, "finished"} and sum(found[state] for state in writer.states) == count


@pytest.mark.parametrize("kind", [AdapterSave, Merge], ids=lambda kind: kind.__name__)
def test_a_kill_before_each_step(writers, kind):
    writer = writers(kind)
    found = kills.at_every_step(writer.prepare, writer.write, writer.check)
    assert set(found) == writer.states and sum(found.values()) > 12


def test_a_kill_before_each_step_where_names_cannot_be_exchanged(writers, monkeypatch):
    """As on NFS: what has begun is finished by the next save; until then there is no half of an adapter to read."""
    writer = writers(AdapterSave)
    monkeypatch.setattr(overwriting, "exchange", lambda one, other: False)

    def check():
        if not (writer.out / "adapter_config.json").exists():
            staging.recover(writer.parent)
        return writer.check()

    assert set(kills.at_every_step(writer.prepare, writer.write, check, stride=2)) == writer.states


def test_a_checkpoint_takes_the_place_of_one_of_its_name(writers):
    """Killed before each step: a whole one has the name, the old or the new."""
    writer = writers(CheckpointSave)
    target = writer.out / "checkpoint-4"
    staged = writer.out / saving.STAGING / "checkpoint-4"

    def prepare():
        writer.prepare()
        shutil.copytree(target, staged)
        (staged / "new").touch()

    def check():
        state = "new" if (target / "new").exists() else "old"
        assert training_checkpoint.find_fault(target) is None
        saving.clean(writer.out, removes=True)
        assert not (writer.out / saving.STAGING).exists() and training_checkpoint.find_fault(target) is None
        return state

    found = kills.at_every_step(prepare, lambda: staging.replace_folder(staged, target), check)
    assert set(found) == {"old", "new"}
