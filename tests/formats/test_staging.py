"""The one way to write: what is there before stays until the new thing is whole; nothing planted is followed."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import stat

import pytest

from kt_sft.errors import OutputError
from kt_sft.formats import disk, overwriting, renaming, staging
from kt_sft.formats.overwriting import saved_into
from kt_sft.formats.staging import new_file, new_path, write_text
from tests.helpers import kills

LONG = "n" * 255
HOLDER = ".kt_sft-0123456789abcdef"


class Stopped(BaseException):
    pass


def fill(folder, text, *names):
    for name in names or ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text(text)


def save(folder, text, *names, **arguments):
    with saved_into(folder, **arguments) as staged:
        fill(staged, text, *names)


def put_file(target, text):
    write_text(target, text)


def put_folder(target, text):
    with new_path(target, is_file=False, replaces=True) as staged:
        fill(staged, text)


def put_into(target, text):
    save(target, text)


def text_of(target):
    if target.is_file():
        return target.read_text()
    texts = {path.read_text() for path in target.iterdir() if path.is_file()}
    assert len(texts) == 1 and len(list(target.iterdir())) == 2
    return texts.pop()


WAYS = [put_file, put_folder, put_into]
ways = pytest.mark.parametrize("put", WAYS, ids=lambda put: put.__name__)


@ways
@pytest.mark.parametrize("name", ["out", LONG, "ü \n'\"", "-rf", ".hidden"])
def test_a_new_thing_and_one_in_place_of_an_older_one(tmp_path, put, name):
    for text in ("one", "two"):
        put(tmp_path / "a" / "b" / name, text)
        assert text_of(tmp_path / "a" / "b" / name) == text
    assert os.listdir(tmp_path / "a" / "b") == [name]


@ways
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_rights_are_those_of_the_umask_and_of_the_older_folder(tmp_path, put, umask):
    before = os.umask(umask)
    try:
        put(tmp_path / "out", "one")
        found = {path: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "out", *tmp_path.rglob("out/*")]}
        assert all(mode == (0o777 if path.is_dir() else 0o666) & ~umask for path, mode in found.items())
        if put is not put_file:
            (tmp_path / "out").chmod(0o2711)
            put(tmp_path / "out", "two")
            assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o2711
    finally:
        os.umask(before)


@ways
def test_a_failure_keeps_the_older_thing_and_leaves_nothing(tmp_path, put, monkeypatch):
    put(tmp_path / "out", "one")
    for kind in (Stopped(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError(errno.EROFS, "read-only")):

        def fail(*_args, kind=kind):
            raise kind

        with monkeypatch.context() as patch, pytest.raises((OutputError, Stopped)) as caught:
            patch.setattr(os, "fsync", fail)
            put(tmp_path / "out", "two")
        assert text_of(tmp_path / "out") == "one" and os.listdir(tmp_path) == ["out"]
        assert "\n" not in str(caught.value)
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="Read-only file system"):
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EROFS, os.strerror(errno.EROFS))))
        put(tmp_path / "new" / "deep" / "out", "two")
    assert os.listdir(tmp_path) == ["out"]


@ways
def test_a_disk_that_runs_full_in_the_middle(tmp_path, put):
    put(tmp_path / "out", "one")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
    try:
        with pytest.raises(OutputError, match="File too large; free space, then again"):
            put(tmp_path / "out", "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert text_of(tmp_path / "out") == "one" and os.listdir(tmp_path) == ["out"]


@ways
def test_a_kill_before_each_step_leaves_the_older_or_the_new_one(tmp_path, put):
    place = tmp_path / "place"

    def prepare():
        shutil.rmtree(place, ignore_errors=True)
        put(place / "out", "one")

    def check():
        found = (place / "out").read_text() if put is put_file else (place / "out" / "adapter_config.json").read_text()
        put(place / "out", "three")
        assert text_of(place / "out") == "three" and os.listdir(place) == ["out"]
        return found

    assert set(kills.at_every_step(prepare, lambda: put(place / "out", "two"), check)) == {"one", "two"}


@ways
def test_a_folder_that_vanishes_is_one_line(tmp_path, put, monkeypatch):
    put(tmp_path / "a" / "out", "one")
    real = os.fsync

    def vanish(descriptor):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", vanish)
    with pytest.raises(OutputError, match="No such file") as caught:
        put(tmp_path / "a" / "out", "two")
    assert "\n" not in str(caught.value)


@ways
def test_a_relative_path_holds_although_the_process_moves(tmp_path, put, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    target = staging.Path("out")
    if put is put_file:
        with new_file(target) as stream:
            os.chdir("elsewhere")
            stream.write(b"one")
    else:
        made = saved_into(target) if put is put_into else new_path(target, is_file=False)
        with made as staged:
            os.chdir("elsewhere")
            fill(staged, "one")
    assert text_of(tmp_path / "out") == "one" and not os.listdir(tmp_path / "elsewhere")


def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path):
    (tmp_path / "victim").write_text("only copy")
    for kind, link in ((put_file, tmp_path / "report"), (put_into, tmp_path / "out" / "adapter_config.json")):
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(tmp_path / "victim")
        kind(link if kind is put_file else link.parent, "one")
        assert not link.is_symlink() and (tmp_path / "victim").read_text() == "only copy"


@pytest.mark.parametrize("where", ["file", "folder", "nowhere"])
@pytest.mark.parametrize("is_file", [True, False])
@pytest.mark.parametrize("replaces", [True, False])
def test_a_link_in_the_place_of_a_new_thing_is_refused(tmp_path, where, is_file, replaces):
    (tmp_path / "file").write_text("only copy")
    (tmp_path / "folder").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / where)
    made = new_path(tmp_path / "out", is_file=is_file, replaces=replaces)
    with pytest.raises(OutputError, match="found a symbolic link"), made:
        pass
    assert (tmp_path / "out").is_symlink() and not os.listdir(tmp_path / "folder")


def test_a_link_in_the_place_of_one_of_several_adapters_is_refused(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "second").symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match="found a symbolic link; remove it"), saved_into(tmp_path / "out") as staged:
        (staged / "second").mkdir()
        fill(staged / "second", "one")
    assert not os.listdir(tmp_path / "victim")


def test_something_that_comes_meanwhile_is_not_written_over(tmp_path):
    for is_file in (True, False):
        target = tmp_path / f"out-{is_file}"
        made = new_path(target, is_file=is_file)
        with pytest.raises(OutputError, match="meanwhile"), made as staged:
            target.write_text("of another")
            staged.write_text("mine") if is_file else fill(staged, "mine")
        assert target.read_text() == "of another"


def test_what_is_there_is_refused_before_work(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "file").write_text("x")
    for target, is_file in (("full", False), ("full", True), ("file", True), ("file", False)):
        with pytest.raises(OutputError, match="expected a new path, found something there; choose another"):
            new_path(tmp_path / target, is_file=is_file).__enter__()
    with pytest.raises(OutputError, match="expected a directory, found a file"):
        saved_into(tmp_path / "file").__enter__()
    with pytest.raises(OutputError, match=r"Not a directory|File exists|expected a directory"):
        saved_into(tmp_path / "file" / "x").__enter__()
    (tmp_path / "empty").mkdir(0o711)
    with new_path(tmp_path / "empty", is_file=False) as staged:
        fill(staged, "x")
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o711


@pytest.mark.parametrize("made", [saved_into, lambda target, **sizes: new_path(target, is_file=False, **sizes)])
def test_space_is_looked_at_first(tmp_path, made):
    with pytest.raises(OutputError, match=r"disk space: expected 93132257.\d+ GiB, found .* free; free space"):
        made(tmp_path / "deep" / "out", needed_bytes=10**17).__enter__()
    assert not os.listdir(tmp_path)


def leave_behind(parent, target="out", **content):
    """What a killed writer leaves."""
    place = parent / HOLDER
    place.mkdir()
    (place / staging._LOCK).write_text(f'{{"target": "{target}"}}')
    for name, text in content.items():
        (place / name).mkdir()
        fill(place / name, text)
    return place


@ways
def test_what_the_dead_have_left_is_removed_and_nothing_else(tmp_path, put):
    place = leave_behind(tmp_path, out="half")
    os.symlink(tmp_path / "out", place / "link")
    (tmp_path / ".kt_sft-notes").mkdir()  # of a user
    (tmp_path / ".kt_sft-0000000000000000").write_text("a file")
    (tmp_path / ".kt_sft-1111111111111111").symlink_to(tmp_path / ".kt_sft-notes")
    (tmp_path / ".kt_sft-2222222222222222").mkdir()  # killed before it had its lock
    (tmp_path / ".kt_sft-4444444444444444").mkdir()
    (tmp_path / ".kt_sft-4444444444444444" / "thesis").write_text("without a lock it is none of ours")
    other = leave_behind_live(tmp_path)
    put(tmp_path / "out", "one")
    assert not place.exists() and not (tmp_path / ".kt_sft-2222222222222222").exists()
    kept = {
        ".kt_sft-4444444444444444",
        ".kt_sft-notes",
        ".kt_sft-0000000000000000",
        ".kt_sft-1111111111111111",
        "out",
        other[0].name,
    }
    assert set(os.listdir(tmp_path)) == kept and len(os.listdir(other[0])) == 2
    os.close(other[1])
    put(tmp_path / "out", "two")
    assert not other[0].exists()


def leave_behind_live(parent):
    place = parent / ".kt_sft-3333333333333333"
    place.mkdir()
    (place / "half").write_text("of one that lives")
    lock = os.open(place / staging._LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return place, lock


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's rights are tried by root")
@ways
def test_a_folder_that_cannot_be_written(tmp_path, put):
    """By another user: below a folder of root's, a new thing is refused; into a folder of its own it is saved."""
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    put(tmp_path / "out", "one")
    os.chown(tmp_path / "out", 65534, 65534)
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.setuid(65534)
            if put is put_into:
                put(tmp_path / "out", "two")
                code = 0
            target = tmp_path / "out" if put is not put_into else tmp_path / "new"
            try:
                put(target, "three")
            except OutputError as error:
                code = 0 if "Permission denied" in str(error) and "\n" not in str(error) else 1
            else:
                code = 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert text_of(tmp_path / "out") == ("two" if put is put_into else "one") and os.listdir(tmp_path) == ["out"]


def test_leftovers_of_another_user_are_left_alone(tmp_path, monkeypatch):
    place = leave_behind(tmp_path, out="half")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    staging.recover(tmp_path)
    assert place.exists()


@pytest.mark.parametrize("target", ["../victim", "/etc/x", "..", "", 7])
def test_a_planted_record_leads_nowhere(tmp_path, target):
    """A folder of our name whose lock says that a rename to somewhere else had begun."""
    parent = tmp_path / "parent"
    parent.mkdir()
    place = leave_behind(parent, target, **{staging._REPLACED: "planted", "victim": "planted"})
    staging.recover(parent)
    assert not place.exists() and os.listdir(tmp_path) == ["parent"]


def test_where_the_file_system_has_no_locks_nothing_is_removed(tmp_path, monkeypatch):
    place = leave_behind(tmp_path, out="half")

    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    for put in WAYS:
        put(tmp_path / put.__name__, "one")
    assert place.exists() and len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize("missing", ["exchange", "no replace"])
def test_a_file_system_without_special_renames(tmp_path, monkeypatch, missing):
    monkeypatch.setattr(renaming, "_rename", lambda *_: False)
    for put in WAYS:
        for text in ("one", "two"):
            put(tmp_path / put.__name__, text)
            assert text_of(tmp_path / put.__name__) == text
    with pytest.raises(OutputError, match="meanwhile"), new_path(tmp_path / "x", is_file=True) as staged:
        staged.write_text("mine")
        (tmp_path / "x").write_text("of another")


def test_a_folder_that_was_moved_aside_comes_back(tmp_path):
    """Killed between the two renames of a file system that cannot exchange names."""
    leave_behind(tmp_path, **{staging._REPLACED: "old", "out": "new"})
    staging.recover(tmp_path)
    assert text_of(tmp_path / "out") == "new"
    shutil.rmtree(tmp_path / "out")
    leave_behind(tmp_path, **{staging._REPLACED: "old"})
    staging.recover(tmp_path)
    assert text_of(tmp_path / "out") == "old"


# --- files of a folder that holds other things


def test_files_that_belong_together_change_in_one_step_and_others_stay(tmp_path):
    folder = tmp_path / "out"
    save(folder, "one")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "x").write_text("kept")
    (folder / "log").write_text("kept")
    (folder / "link").symlink_to("log")
    inodes = {name: (folder / name).stat().st_ino for name in ("log", "checkpoint-1/x")}
    number = folder.stat().st_ino
    with (folder / "log").open("a") as log:
        save(folder, "two")
        log.write(" and written on")
    assert folder.stat().st_ino != number  # exchanged
    assert {name: (folder / name).stat().st_ino for name in inodes} == inodes
    assert (folder / "log").read_text() == "kept and written on" and os.readlink(folder / "link") == "log"
    assert (folder / "adapter_config.json").read_text() == (folder / "adapter_model.safetensors").read_text() == "two"
    assert os.listdir(tmp_path) == ["out"]


def test_the_folder_itself_stays_where_one_rename_does(tmp_path):
    """A new adapter, or weights of the same config: a shell in the folder keeps its place."""
    folder = tmp_path / "out"
    folder.mkdir()
    number = folder.stat().st_ino
    save(folder, "one")
    with saved_into(folder) as staged:
        fill(staged, "one", "adapter_config.json")
        fill(staged, "two", "adapter_model.safetensors", "README.md")
    assert folder.stat().st_ino == number
    assert (folder / "adapter_config.json").read_text() == "one"
    assert (folder / "adapter_model.safetensors").read_text() == "two"


def test_a_process_keeps_its_working_directory(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    save(folder, "one")
    (folder / "deep").mkdir()
    monkeypatch.chdir(folder / "deep")
    number = folder.stat().st_ino
    save(folder, "two")
    assert folder.stat().st_ino == number and os.getcwd() == str(folder / "deep")
    assert (folder / "adapter_config.json").read_text() == (folder / "adapter_model.safetensors").read_text() == "two"
    monkeypatch.chdir(folder)
    save(".", "three")
    assert (folder / "adapter_config.json").read_text() == "three"


def test_what_others_put_into_the_folder_meanwhile_is_kept(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    save(folder, "one")
    (folder / "runs").mkdir()
    real = overwriting.exchange

    def exchange(one, other):
        (folder / "new").write_text("x")
        (folder / "runs" / "new").write_text("x")
        return real(one, other)

    monkeypatch.setattr(overwriting, "exchange", exchange)
    save(folder, "two")
    assert (folder / "new").read_text() == (folder / "runs" / "new").read_text() == "x"
    assert (folder / "adapter_config.json").read_text() == "two"


@pytest.mark.parametrize("reason", ["mounted", "links", "large", "parent", "other owner", "staging of another"])
def test_where_the_folder_cannot_be_exchanged_files_are_renamed(tmp_path, monkeypatch, reason):
    folder = tmp_path / "out"
    save(folder, "one")
    number = folder.stat().st_ino

    def fail(*_args, **_kwargs):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if reason == "mounted":
        monkeypatch.setattr(disk, "is_mounted", lambda path: True)
    elif reason == "links":
        monkeypatch.setattr(os, "link", fail)
    elif reason == "large":
        monkeypatch.setattr(overwriting, "_LINKED_FILES", 1)
    elif reason == "staging of another":
        place, lock = leave_behind_live(folder)
    elif reason == "other owner":
        monkeypatch.setattr(overwriting, "_link", fail)
    else:
        real = staging.holder
        monkeypatch.setattr(staging, "holder", lambda target, parent=None: real(target, parent) if parent else fail())
    save(folder, "two")
    assert folder.stat().st_ino == number
    if reason == "staging of another":
        assert len(os.listdir(place)) == 2
        os.close(lock)
        staging.recover(folder)
    assert text_of(folder) == "two"


def test_an_adapter_that_is_half_renamed_is_finished_and_cannot_be_read_until_then(tmp_path, monkeypatch):
    monkeypatch.setattr(overwriting, "exchange", lambda one, other: False)
    folder = tmp_path / "out"

    def prepare():
        shutil.rmtree(folder, ignore_errors=True)
        save(folder, "one", "adapter_config.json", "adapter_model.safetensors", "kt_sft.json")

    def check():
        state = "none"
        if (folder / "adapter_config.json").exists():
            texts = {path.read_text() for path in folder.iterdir() if path.is_file()}
            assert len(texts) == 1
            state = texts.pop()
        staging.recover(tmp_path)
        assert {path.read_text() for path in folder.iterdir()} in ({"one"}, {"two"}) and len(os.listdir(folder)) == 3
        return state

    def write():
        save(folder, "two", "adapter_config.json", "adapter_model.safetensors", "kt_sft.json")

    assert set(kills.at_every_step(prepare, write, check)) == {"one", "none", "two"}


def test_weights_of_an_earlier_model_are_dropped_with_it(tmp_path):
    folder = tmp_path / "out"
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    save(folder, "one", "config.json", "model.safetensors.index.json", *shards)
    (folder / "notes.txt").write_text("kept")
    save(folder, "two", "config.json", "model.safetensors")
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "notes.txt"]
    save(folder, "three")  # an adapter beside it: no model
    assert (folder / "model.safetensors").read_text() == "two"


def test_two_adapters_in_one_folder(tmp_path):
    folder = tmp_path / "out"
    for text in ("one", "two"):
        with saved_into(folder) as staged:
            fill(staged, text)
            (staged / "second").mkdir()
            fill(staged / "second", text)
        assert {path.read_text() for path in folder.rglob("*") if path.is_file()} == {text}
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors", "second"]


def test_a_second_writer_waits_for_the_first(tmp_path):
    folder, children = tmp_path / "out", []
    save(folder, "zero")
    for number in range(4):
        if (child := os.fork()) == 0:
            try:
                for _ in range(10):
                    save(folder, str(number))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    seen = set()
    while children:
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            assert status == 0
            children.remove(done)
        with_folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # one state of it, as a reader that opens it has
        try:
            texts = []
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                descriptor = os.open(name, os.O_RDONLY, dir_fd=with_folder)
                texts.append(os.read(descriptor, 10))
                os.close(descriptor)
            assert texts[0] == texts[1]
            seen.add(texts[0])
        except FileNotFoundError:
            pass  # the state is being removed
        finally:
            os.close(with_folder)
    assert len(set(map(bytes, seen))) > 1 and len(os.listdir(tmp_path)) == 1
    assert text_of(folder) in set("0123")


def test_words_of_a_fault_are_those_of_the_file_system():
    full, match = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "x: writing: found No space left on device; free"
    with pytest.raises(OutputError, match=match) as caught, disk.reporting("x"):
        raise full
    assert disk.reason(caught.value) == "No space left on device"
    with pytest.raises(ValueError, match="no fault of the disk"), disk.reporting("x"):
        raise ValueError("no fault of the disk")
