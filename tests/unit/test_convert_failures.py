"""A conversion that fails leaves nothing that was not there before, and what was there as it was."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from types import SimpleNamespace

import pytest

from kt_sft.convert import plan as planning
from kt_sft.convert.plan import LOCK_NAME
from kt_sft.convert.run import convert
from kt_sft.errors import FormatError, OutputError
from tests.helpers.containers import SPECS, RandomExperts, files_of, plan_for
from tests.unit.test_convert import stop_at

FIRST, SECOND = SPECS


@pytest.fixture
def source(tmp_path):
    return RandomExperts(tmp_path / "source")


def no_space(source, folder, monkeypatch):
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))


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
