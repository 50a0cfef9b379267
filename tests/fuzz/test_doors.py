"""Damage to anything that is read is one KTError or does no harm; a short form of `python -m tests.fuzz`."""

from __future__ import annotations

import importlib
import random

import pytest

from kt_sft.errors import FormatError
from tests.fuzz import blobs, runner
from tests.fuzz.case import Case, Subject, write_good
from tests.fuzz.documents import Json, Plain, TorchArchive, Yaml
from tests.fuzz.doors import DOORS
from tests.fuzz.gguf_document import parse, write
from tests.fuzz.watch import FAILED, REFUSED, RIGHT, attempt
from tests.helpers import gguf_files

SEED = 15  # in the few cases some are right at every door
FEW = {False: 120, True: 12}  # cases by `Door.loads`
FEW_REQUESTS = 100  # most are refused; each takes two milliseconds
MANY = {False: 5000, True: 300}


def told(tally: runner.Tally) -> str:
    return "\n".join(f"{fault.count} x {fault.detail}: {fault.command}" for fault in tally.faults.values())


@pytest.mark.parametrize("door", DOORS)
def test_few_cases(door):
    cases = FEW_REQUESTS if door.startswith("request") else FEW[DOORS[door].loads]
    tally = runner.run(door, SEED, range(cases))
    assert not tally.failed, told(tally)
    assert tally.right


@pytest.mark.fuzz
@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_many_cases(door):
    tally = runner.run_in_child(door, SEED, range(MANY[DOORS[door].loads]))
    assert not tally.failed, told(tally)
    assert tally.cases == MANY[DOORS[door].loads]


def outcome_of(read, tmp_path, check=lambda folder, result: None):
    subject = Subject({"a.json": Json(b'{"a": 1}')}, read, check)
    write_good(subject, tmp_path)
    return attempt(Case(0, "a", 0), subject, tmp_path)


def fail(folder):
    raise KeyError("a")


def refuse(folder):
    raise FormatError(folder, "a" * 100_000, expected="b\nc", found="d")


def hang(folder):
    while True:
        pass


def follow(folder):
    importlib.import_module("tests.fuzz.tripwire")


@pytest.mark.parametrize(
    ("read", "kind", "detail"),
    [
        (fail, FAILED, "KeyError"),
        (refuse, REFUSED, "..."),
        (hang, FAILED, "Hang: more than 0.2 s"),
        (lambda folder: bytearray(1 << 30), FAILED, "MemoryError"),
        (lambda folder: bytearray(200 << 20), RIGHT, ""),
        (follow, FAILED, "code that a file names was run"),
    ],
    ids=["another exception", "a KTError", "a hang", "1 GiB", "200 MiB", "an import"],
)
def test_what_a_reader_does_is_seen(read, kind, detail, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.fuzz.watch.SECONDS", 0.2)
    outcome = outcome_of(read, tmp_path)
    assert outcome.kind == kind and detail in outcome.detail


def test_a_wrong_result_is_seen(tmp_path):
    def check(folder, result):
        assert result == 2

    assert outcome_of(lambda folder: 1, tmp_path, check).kind == FAILED


@pytest.mark.parametrize("door", ["safetensors-index", "gguf", "adapter-bin", "rules"])
def test_a_case_follows_from_its_numbers_alone(door, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    one, other = (DOORS[door].build(tmp_path / name) for name in ("one", "other"))
    for number in range(40):
        case = Case(3, door, number)
        assert case.damage(one) == case.damage(other)
    assert len({repr(Case(3, door, number).damage(one)) for number in range(40)}) > 30


def test_edits_change_a_document_and_none_does_not():
    rngs = [random.Random(number) for number in range(300)]
    documents = [Json(b'{"a": [1, "x"]}'), Yaml(b"a: 1\nb: [x]\n"), Plain(bytes(100)), TorchArchive({"a": 1})]
    for document in documents:
        results = {document.edited([rng]) for rng in rngs}
        assert len(results) > 50, type(document)
    assert blobs.edit(b"", rngs[0]) in (b"", b"\0" * 8, b"{}", b"GGUF")


def test_a_gguf_tree_is_the_file_again(tmp_path):
    tensors = {"x": gguf_files.random_blocks("Q8_0", (3, 64)), "y": gguf_files.random_blocks("F32", (5,))}
    file = gguf_files.write(tmp_path / "m.gguf", {"a": 1, "b": "x", "c": [1.5, 2.0], "d": [["x"], ["y"]]}, tensors)
    tree, data, _ = parse(file.read_bytes())
    assert write(tree, data) == file.read_bytes()


def test_edited_tensors_are_often_still_a_file():
    """Else nothing behind the header is ever reached."""
    assert runner.run("safetensors", 1, range(200)).right > 20
