"""Conversions that are stopped, resumed, run twice, or run out of space: one clear error and never half a container."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from kt_sft.convert import plan as planning
from kt_sft.convert import run as running
from kt_sft.convert.plan import LOCK_NAME
from kt_sft.convert.run import convert
from kt_sft.convert.verify import verify
from kt_sft.errors import ConfigError, FormatError, OutputError
from kt_sft.formats.packed import PackedContainer
from kt_sft.models.spec import ExpertsSpec
from tests.helpers.containers import SPECS, RandomExperts, blobs_of, files_of, plan_for

FIRST, SECOND = SPECS
MANY = {f"model.layers.{i}.mlp.experts": ExpertsSpec(8, 260, 132) for i in range(12)}
CHILD = """
import sys
from pathlib import Path
from kt_sft.convert.run import convert
from tests.helpers.containers import RandomExperts, plan_for
from tests.convert.test_convert import MANY
source = RandomExperts(Path(sys.argv[1]) / "source", MANY)
print("now", flush=True)
convert(source, plan_for(source, Path(sys.argv[1]) / "out"))
"""
EVENTS = ((os, "fsync"), (os, "replace"), (zlib, "crc32"))  # what a conversion does to the disk, and one per matrix


@pytest.fixture
def source(tmp_path):
    return RandomExperts(tmp_path / "source")


@pytest.fixture
def whole(source, tmp_path):
    """Files of a conversion that nothing disturbed."""
    convert(source, plan_for(source, tmp_path / "whole"))
    source.reads.clear()
    return files_of(tmp_path / "whole")


class Interrupted(BaseException):
    pass


def stop_at(monkeypatch, number, stop):
    """Call `stop` in place of the event of that number, from 0."""
    count = iter(range(10**6))

    def hooked(real):
        def call(*args):
            if next(count) == number:
                stop()
            return real(*args)

        return call

    for module, name in EVENTS:
        monkeypatch.setattr(module, name, hooked(getattr(module, name)))
    return count


def count_events(monkeypatch, source, folder):
    with monkeypatch.context() as patch:
        count = stop_at(patch, -1, lambda: None)
        convert(source, plan_for(source, folder))
        return next(count)


def killed(monkeypatch, source, folder, number):
    """Convert in a child process that kills itself with signal 9 at an event."""
    child = os.fork()
    if child == 0:
        stop_at(monkeypatch, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        try:
            convert(source, plan_for(source, folder))
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def assert_resumes(source, folder, whole):
    convert(source, plan_for(source, folder))
    assert files_of(folder) == whole
    with PackedContainer(folder) as container:
        verify(container, source, SPECS)


def test_kill_9_at_every_step_leaves_no_container_and_is_resumed(monkeypatch, source, tmp_path, whole):
    steps = count_events(monkeypatch, source, tmp_path / "counted")
    assert steps > 20
    for number in range(0, steps):
        folder = tmp_path / f"killed-{number}"
        killed(monkeypatch, source, folder, number)
        names = set(os.listdir(folder))
        if "manifest.json" in names:
            PackedContainer(folder).close()  # killed after the manifest was in place: complete
        else:
            with pytest.raises(FormatError, match="unfinished|No such file"):
                PackedContainer(folder)
        source.reads.clear()
        assert_resumes(source, folder, whole)


def test_nothing_is_announced_before_it_is_on_the_disk(monkeypatch, source, tmp_path):
    """What a loss of power would show: a name, a journal line or a manifest whose data never arrived."""
    events = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(handle):
        number = handle if isinstance(handle, int) else handle.fileno()
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{number}")).name))
        real_sync(handle)

    def replace(old, new):
        events.append(("rename", Path(new).name))
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    convert(source, plan_for(source, tmp_path / "out"))
    journal = "convert-journal.jsonl"
    expected = [("sync", tmp_path.name)]  # the name of the folder itself
    for name in (journal, "layer-00000.bin", journal, "layer-00001.bin", journal, "manifest.json"):
        expected += [("sync", f"{name}.part"), ("rename", name), ("sync", "out")]
    assert events == expected


@pytest.mark.slow
def test_kill_9_at_random_moments_of_a_process(tmp_path):
    """Again and again in one folder, a little later each time: every run adds to what the ones before have left."""
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    random.seed(0)
    unfinished = 0
    for attempt in range(12):
        child = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE)
        child.stdout.readline()  # it begins to convert
        time.sleep(random.uniform(0, 0.02 * attempt))
        child.kill()
        child.communicate()
        if (tmp_path / "out" / "manifest.json").exists():
            break
        with pytest.raises(FormatError, match="unfinished|No such file"):
            PackedContainer(tmp_path / "out")
        unfinished += 1
    assert unfinished > 1
    source = RandomExperts(tmp_path / "source", MANY)
    convert(source, plan_for(source, tmp_path / "whole"))
    convert(source, plan_for(source, tmp_path / "out"))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_finished_layers_are_not_done_again(monkeypatch, source, tmp_path, whole):
    def stop():
        raise Interrupted

    def broken(name, expert):
        if name == SECOND and expert == 1:
            stop()
        return RandomExperts.read(source, name, expert)

    monkeypatch.setattr(source, "read", broken)
    with pytest.raises(Interrupted):
        convert(source, plan_for(source, tmp_path / "out"))
    monkeypatch.undo()
    source.reads.clear()
    seen = []
    convert(source, plan_for(source, tmp_path / "out"), progress=lambda done, total, layer: seen.append((done, total)))
    assert source.reads == [(SECOND, 0), (SECOND, 1)] and seen == [(4, 5), (5, 5)]
    assert files_of(tmp_path / "out") == whole


@pytest.mark.parametrize("damage", ["torn line", "garbage", "wrong size", "missing file", "torn first line"])
def test_a_damaged_journal_or_layer_is_done_again(monkeypatch, source, tmp_path, whole, damage):
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(running, "_publish", lambda *args: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            convert(source, plan_for(source, folder))
    journal = folder / "convert-journal.jsonl"
    if damage == "torn line":
        os.truncate(journal, journal.stat().st_size - 20)
    elif damage == "garbage":
        journal.write_bytes(journal.read_bytes() + b'\x00\xff{"name": 3}\n[[[[')
    elif damage == "wrong size":
        os.truncate(folder / "layer-00000.bin", 5000)
    elif damage == "missing file":
        (folder / "layer-00001.bin").unlink()
    else:
        os.truncate(journal, 10)
    assert_resumes(source, folder, whole)


def test_other_settings_or_another_source_do_not_resume(monkeypatch, source, tmp_path):
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(running, "_publish", lambda *args: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            convert(source, plan_for(source, folder))
    before = files_of(folder)
    match = "unfinished conversion to int8 where int4 in groups of 64 is asked for.*--overwrite"
    with pytest.raises(ConfigError, match=match):
        convert(source, plan_for(source, folder, "int4", 64))
    (source.path / "model.safetensors").write_bytes(b"checkpoint edited")
    with pytest.raises(ConfigError, match="unfinished conversion from other source files"):
        convert(source, plan_for(source, folder))
    assert files_of(folder) == before
    convert(source, plan_for(source, folder, "int4", 64), overwrite=True)
    PackedContainer(folder).close()


def test_a_complete_container_is_kept_and_a_different_one_is_not_replaced_unasked(source, tmp_path, whole):
    folder = tmp_path / "out"
    convert(source, plan_for(source, folder))
    source.reads.clear()
    convert(source, plan_for(source, folder))
    assert not source.reads and files_of(folder) == whole
    with pytest.raises(ConfigError, match="finished container of int8, not bf16; .*--overwrite"):
        convert(source, plan_for(source, folder, "bf16"))
    (source.path / "model.safetensors").write_bytes(b"checkpoint edited")
    with pytest.raises(ConfigError, match="finished container of other source files"):
        convert(source, plan_for(source, folder))
    assert files_of(folder) == whole
    mapped = PackedContainer(folder).blobs(FIRST, 0)[0]
    before = bytes(mapped)
    convert(source, plan_for(source, folder, "bf16"), overwrite=True)
    assert bytes(mapped) == before  # who uses the old files keeps them
    assert PackedContainer(folder).manifest.format == "bf16"


def test_an_interrupted_overwrite_goes_on(monkeypatch, source, tmp_path, whole):
    folder = tmp_path / "out"
    convert(source, plan_for(source, folder))
    with monkeypatch.context() as patch:

        def stop(*_):
            raise Interrupted

        patch.setattr(running, "_publish", stop)
        with pytest.raises(Interrupted):
            convert(source, plan_for(source, folder), overwrite=True)
    assert blobs_of(folder) == blobs_of(tmp_path / "whole")  # the old one
    source.reads.clear()
    convert(source, plan_for(source, folder), overwrite=True)
    assert not source.reads and blobs_of(folder) == blobs_of(tmp_path / "whole")
    assert len(files_of(folder)) == len(whole)
    convert(source, plan_for(source, folder), overwrite=True)  # a complete one is made anew
    assert len(source.reads) == sum(spec.num_experts for spec in SPECS.values())


def test_layers_that_a_stop_has_left_alone_are_written_over(source, tmp_path, whole):
    """An overwrite has removed the records of the old container, and not yet begun its own."""
    for overwrite in (False, True):
        folder = tmp_path / f"out-{overwrite}"
        convert(source, plan_for(source, folder, "bf16"))
        (folder / "manifest.json").unlink()
        convert(source, plan_for(source, folder), overwrite=overwrite)
        assert files_of(folder) == whole


def test_a_complete_container_needs_no_lock(source, tmp_path, whole):
    """As on a disk that is mounted read-only; a folder in the lock's place stands for it."""
    folder = tmp_path / "out"
    convert(source, plan_for(source, folder))
    (folder / LOCK_NAME).unlink()
    (folder / LOCK_NAME).mkdir()
    source.reads.clear()
    assert convert(source, plan_for(source, folder), wait=True).identity == plan_for(source, folder).identity
    assert not source.reads


@pytest.mark.parametrize("overwrite", [False, True])
def test_folders_of_others_are_left_alone(source, tmp_path, overwrite):
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "thesis.txt").write_text("only copy")
    with pytest.raises(OutputError, match="thesis.txt among them"):
        convert(source, plan_for(source, folder), overwrite=overwrite)
    assert (folder / "thesis.txt").read_text() == "only copy"
    with pytest.raises(OutputError, match="expected a directory|Not a directory|File exists"):
        convert(source, plan_for(source, folder / "thesis.txt"), overwrite=overwrite)


def test_disk_space_is_looked_at_first(monkeypatch, source, tmp_path):
    monkeypatch.setattr(planning, "free_bytes", lambda folder: 1000)
    with pytest.raises(OutputError, match="disk space for the container: expected 0.06 GiB, found 0.00 GiB free"):
        convert(source, plan_for(source, tmp_path / "out"))
    assert not source.reads


def test_no_space_in_the_middle_is_one_error_and_is_resumed(source, tmp_path, whole):
    """A limit on the file size stands for the full disk: the second layer's file is the larger one."""
    folder = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole["layer-00001.bin"]) - 100, hard))
    try:
        with pytest.raises(OutputError, match="writing the container: found File too large; free space and run"):
            convert(source, plan_for(source, folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(FormatError, match="unfinished"):
        PackedContainer(folder)
    source.reads.clear()
    convert(source, plan_for(source, folder))
    assert {name for name, _ in source.reads} == {SECOND}
    assert files_of(folder) == whole


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_errors_of_the_disk_are_named(monkeypatch, source, tmp_path, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=os.strerror(code)) as caught:
        convert(source, plan_for(source, tmp_path / "out"))
    assert ("free space" in str(caught.value)) == (code == errno.ENOSPC)


def test_two_processes_do_not_write_to_one_folder(source, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    with (folder / "convert.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process converting to it"):
            convert(source, plan_for(source, folder))
    convert(source, plan_for(source, folder))


def test_waiting_processes_find_the_container_of_the_first(source, tmp_path, whole):
    folder, children = tmp_path / "out", []
    for _ in range(3):
        if (child := os.fork()) == 0:
            try:
                convert(source, plan_for(source, folder), wait=True)
                os._exit(0 if len(source.reads) in (0, 5) else 1)
            finally:
                os._exit(2)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert files_of(folder) == whole


def test_weights_that_cannot_be_packed_are_named(monkeypatch, source, tmp_path):
    def read(name, expert):
        gate, up, down = RandomExperts.read(source, name, expert)
        if name == SECOND:
            up[3, 4] = float("nan")
        return gate, up, down

    monkeypatch.setattr(source, "read", read)
    with pytest.raises(FormatError, match=f"0.up_proj.weight .expert 0 of {SECOND}.*found nan at row 3, column 4"):
        convert(source, plan_for(source, tmp_path / "out"))


def test_verify_sees_weights_of_another_source(source, tmp_path):
    convert(source, plan_for(source, tmp_path / "out"))
    with PackedContainer(tmp_path / "out") as container:
        verify(container, source, SPECS)
        with pytest.raises(FormatError, match="gate of expert 0 against .*expected rel-L2 0.00"):
            verify(container, RandomExperts(tmp_path / "other", seed=5), SPECS)
