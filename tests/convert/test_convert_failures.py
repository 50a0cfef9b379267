"""A conversion that fails leaves nothing that was not there before, and what was there as it was."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time

import pytest

from kt_sft.convert import plan as planning
from kt_sft.convert.plan import LOCK_NAME
from kt_sft.convert.run import convert
from kt_sft.errors import FormatError, OutputError
from kt_sft.formats.packed import PackedContainer
from tests.convert.test_convert import stop_at
from tests.helpers.containers import SPECS, RandomExperts, blobs_of, files_of, plan_for

FIRST, SECOND = SPECS


@pytest.fixture
def source(tmp_path):
    return RandomExperts(tmp_path / "source")


def no_space(source, folder, monkeypatch):
    monkeypatch.setattr(planning, "free_bytes", lambda folder: 1000)


def full_disk(source, folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)


def ctrl_c(source, folder, monkeypatch):
    stop_at(monkeypatch, 2, lambda: (_ for _ in ()).throw(KeyboardInterrupt))


def damaged_later(source, folder, monkeypatch):
    def read(name, expert):
        matrices = RandomExperts.read(source, name, expert)
        if name == SECOND:
            matrices[1][0, 0] = float("inf")
        return matrices

    monkeypatch.setattr(source, "read", read)


def gone(source, folder, monkeypatch):
    def read(name, expert):
        raise FormatError(source.path, "checkpoint", found="missing")

    monkeypatch.setattr(source, "read", read)


def gone_later(source, folder, monkeypatch):
    def read(name, expert):
        if name == SECOND:
            raise FormatError(source.path, "checkpoint", found="missing")
        return RandomExperts.read(source, name, expert)

    monkeypatch.setattr(source, "read", read)


FAILURES = [no_space, full_disk, ctrl_c, damaged_later, gone]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("fails", FAILURES, ids=lambda fails: fails.__name__)
def test_a_failure_leaves_nothing_that_was_not_there(monkeypatch, source, tmp_path, fails, overwrite):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new" / "out", tmp_path / "empty"):
        with monkeypatch.context() as patch, pytest.raises((OutputError, FormatError, KeyboardInterrupt)):
            fails(source, folder, patch)
            convert(source, plan_for(source, folder), overwrite=overwrite)
    assert not (tmp_path / "new").exists()
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("fails", [no_space, full_disk, ctrl_c, gone], ids=lambda fails: fails.__name__)
def test_a_failed_overwrite_gives_the_old_container_back(monkeypatch, source, tmp_path, fails):
    folder = tmp_path / "out"
    convert(source, plan_for(source, folder, "bf16"))
    before = files_of(folder)
    fails(source, folder, monkeypatch)
    with pytest.raises((OutputError, FormatError, KeyboardInterrupt)):
        convert(source, plan_for(source, folder), overwrite=True)
    assert files_of(folder) == before


@pytest.mark.parametrize("fails", [damaged_later, gone_later], ids=lambda fails: fails.__name__)
def test_an_overwrite_that_fails_late_keeps_the_old_container(monkeypatch, source, tmp_path, fails):
    """The first layer of the new one is done by then; it is kept unless the source itself is to blame."""
    folder = tmp_path / "out"
    convert(source, plan_for(source, folder, "bf16"))
    before = blobs_of(folder)
    with monkeypatch.context() as patch, pytest.raises(FormatError):
        fails(source, folder, patch)
        convert(source, plan_for(source, folder), overwrite=True)
    assert blobs_of(folder) == before
    layers = {name for name in os.listdir(folder) if name.startswith("layer-")}
    assert len(layers) == (2 if fails is damaged_later else 3)
    source.reads.clear()
    convert(source, plan_for(source, folder), overwrite=True)
    assert len(source.reads) == (5 if fails is damaged_later else 2)
    convert(source, plan_for(source, tmp_path / "whole"))
    assert blobs_of(folder) == blobs_of(tmp_path / "whole") != before
    assert len(files_of(folder)) == 3


def test_an_overwrite_that_is_not_finished_can_be_given_up(monkeypatch, source, tmp_path):
    """The old command finds its container, and takes away what the other one has begun."""
    folder = tmp_path / "out"
    convert(source, plan_for(source, folder, "bf16"))
    before = files_of(folder)
    with monkeypatch.context() as patch, pytest.raises(FormatError):
        gone_later(source, folder, patch)
        convert(source, plan_for(source, folder), overwrite=True)
    convert(source, plan_for(source, folder, "bf16"))
    assert files_of(folder) == before


def test_a_container_of_a_later_release_is_kept_until_the_new_one_is_whole(monkeypatch, source, tmp_path):
    folder = tmp_path / "out"
    convert(source, plan_for(source, folder, "bf16"))
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 99}))
    before = files_of(folder)
    with pytest.raises(FormatError, match="version"):
        PackedContainer(folder)
    with monkeypatch.context() as patch, pytest.raises(FormatError, match="checkpoint"):
        gone_later(source, folder, patch)
        convert(source, plan_for(source, folder), overwrite=True)
    assert before.items() <= files_of(folder).items()
    convert(source, plan_for(source, folder), overwrite=True)
    assert len(files_of(folder)) == 3 and len(blobs_of(folder)) == 5


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["layer-00000.bin.part", "layer-00000.bin", "manifest.json.part"])
def test_a_planted_link_is_replaced_and_not_followed(source, tmp_path, name, overwrite):
    folder, victim = tmp_path / "out", tmp_path / "victim"
    victim.write_text("only copy")
    folder.mkdir()
    (folder / name).symlink_to(victim)
    convert(source, plan_for(source, folder), overwrite=overwrite)
    assert victim.read_text() == "only copy" and not any(path.is_symlink() for path in folder.iterdir())
    assert len(blobs_of(folder)) == 5


@pytest.mark.parametrize("kind", ["link", "hanging link", "pipe"])
@pytest.mark.parametrize("name", ["convert.lock", "convert-journal.jsonl"])
def test_a_lock_or_journal_that_is_no_file_is_refused_in_a_line(source, tmp_path, name, kind):
    folder, victim = tmp_path / "out", tmp_path / "victim"
    folder.mkdir()
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        if kind == "link":
            victim.write_text("only copy")
        (folder / name).symlink_to(victim)
    if (name, kind) == ("convert.lock", "pipe"):  # can be locked as well as a file
        convert(source, plan_for(source, folder))
        return
    with pytest.raises(OutputError) as caught:
        convert(source, plan_for(source, folder))
    assert "\n" not in str(caught.value) and victim.exists() == (kind == "link")
    assert kind != "link" or victim.read_text() == "only copy"


def test_a_hard_link_in_the_journals_place_is_not_written_to(source, tmp_path):
    folder, victim = tmp_path / "out", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("")
    os.link(victim, folder / "convert-journal.jsonl")
    convert(source, plan_for(source, folder))
    assert not victim.read_text() and len(blobs_of(folder)) == 5


def test_a_waiting_process_makes_the_folder_again(source, tmp_path):
    """The one that it waits for fails and takes the folder away."""
    folder = tmp_path / "out"
    folder.mkdir()
    read, write = os.pipe()
    child = os.fork()  # before the lock is taken: it would be the child's, too
    if child == 0:
        code = 1
        try:
            os.read(read, 1)
            convert(source, plan_for(source, folder), wait=True)
            code = 0
        finally:
            os._exit(code)
    with (folder / LOCK_NAME).open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.write(write, b"x")
        time.sleep(0.3)
        (folder / LOCK_NAME).unlink()
        folder.rmdir()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    convert(source, plan_for(source, tmp_path / "whole"))
    assert files_of(folder) == files_of(tmp_path / "whole")
