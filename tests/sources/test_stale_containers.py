"""Containers, caches and model directories of GGUF files, when the files that they were made of are others now."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

import kt_sft
from kt_sft import KTConfig
from kt_sft.convert.plan import finished_manifest
from kt_sft.errors import ConfigError, FormatError
from kt_sft.formats.gguf import GgufIndex
from kt_sft.formats.packed import PackedContainer
from kt_sft.formats.source_hash import ENDS_HASH, hash_source
from kt_sft.integrations.gguf import model as gguf_model
from tests.helpers import containers, gguf_models, tiny_models
from tests.integrations.gguf.test_gguf_model import contents
from tests.sources.test_containers import convert, logits

CONFIG = {"threads": 1, "method": "INT8"}
STALE = "was not made of the model's own files as they are now"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("stale")
    source = tiny_models.build("qwen3_moe", root / "source")
    convert(source, root / "packed")
    return source, root / "packed"


@pytest.fixture
def made(original, tmp_path):
    """A checkpoint, for the test alone, and its container."""
    return tuple(shutil.copytree(folder, tmp_path / folder.name) for folder in original)


def said(caplog, source, packed):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="kt_sft"):
        kt_sft.load_model(source, KTConfig(**CONFIG, weight_path=str(packed)))
    found = [r.getMessage() for r in caplog.records if "container" in r.getMessage()]
    assert all("\n" not in line for line in found)
    return found


def retrain(source, key=".experts."):
    def change(tensors):
        return {k: t + 0.01 if key in k else t for k, t in tensors.items()}

    tiny_models.rewrite(source, change)


def test_container_of_the_model_says_nothing(made, caplog):
    source, packed = made
    assert said(caplog, source, packed) == []
    os.utime(source / "model.safetensors")  # a copy has another time, and the digest is of all bytes
    assert said(caplog, source, packed) == []


@pytest.mark.parametrize("key", [".experts.", "experts.2.up_proj"])
def test_model_trained_further_is_named(made, caplog, key):
    """Same shapes, same size, and a time that who writes it has kept."""
    source, packed = made
    file = source / "model.safetensors"
    before = file.stat()
    retrain(source, key)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    (line,) = said(caplog, source, packed)
    assert STALE in line and f"{file} has other content" in line and "kt-sft convert --overwrite" in line
    with pytest.raises(ConfigError, match="finished container of other source files"):
        convert(source, packed, check=True)


def test_container_of_another_fine_tune(made, caplog, tmp_path):
    other = tiny_models.build("qwen3_moe", tmp_path / "other", seed=5)
    (line,) = said(caplog, other, made[1])
    assert STALE in line and f"{other / 'model.safetensors'} has " in line


def test_other_shards(made, caplog, tmp_path):
    other = tiny_models.build("qwen3_moe", tmp_path / "other", sharded=True)
    (line,) = said(caplog, other, made[1])
    assert STALE in line and "it has model-00001-of" in line and "is of model.safetensors" in line


def test_model_directory_without_experts_has_nothing_to_compare(made, caplog):
    source, packed = made
    tiny_models.rewrite(source, lambda tensors: {k: t for k, t in tensors.items() if ".experts." not in k})
    assert said(caplog, source, packed) == []


def test_later_files_whose_digest_is_of_samples(made, caplog, monkeypatch):
    """Large files: an edit between the samples shows in the time, as a copy does."""
    source, packed = made
    monkeypatch.setattr("kt_sft.sources.packed.is_complete", lambda size, how: False)
    os.utime(source / "model.safetensors", ns=(0, (packed / "manifest.json").stat().st_mtime_ns + 10**9))
    (line,) = said(caplog, source, packed)
    assert "model.safetensors was written after the container" in line and "kt-sft convert --verify" in line
    caplog.clear()
    cached = KTConfig(**CONFIG, weight_cache=str(source.parent / "cache"))
    kt_sft.load_model(source, cached)
    os.utime(source / "model.safetensors", ns=(0, 4 * 10**18))
    with caplog.at_level(logging.WARNING, logger="kt_sft"):
        kt_sft.load_model(source, cached)
    assert "was written after the container" in caplog.text


def test_cache_of_an_earlier_state_is_not_used(made):
    source, _ = made
    file, config = source / "model.safetensors", KTConfig(**CONFIG, weight_cache=str(source.parent / "cache"))
    first = kt_sft.load_model(source, config)
    before = file.stat()
    retrain(source, "experts.2.up_proj")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = kt_sft.load_model(source, config)
    assert torch.equal(logits(second), logits(kt_sft.load_model(source, KTConfig(**CONFIG))))
    assert not torch.equal(logits(first), logits(second))


@pytest.mark.parametrize("size", [0, 100, (1 << 20) + 5, 16 << 20, (16 << 20) + 1, 40 << 20])
def test_digest_is_of_all_bytes_or_of_samples(tmp_path, size):
    file = tmp_path / "f"
    data = bytearray(os.urandom(min(size, 1 << 16)) * (size // (1 << 16) + 1))[:size]
    file.write_bytes(data)
    found = hash_source(file)
    if size <= 16 << 20:
        assert found.digest == hashlib.sha256(size.to_bytes(8, "little") + data).hexdigest()
    ends = data[: 1 << 20] + data[max(1 << 20, size - (1 << 20)) :]
    assert hash_source(file, ENDS_HASH).digest == hashlib.sha256(size.to_bytes(8, "little") + ends).hexdigest()
    for begin in range(0, max(size - (1 << 20), 0), 3 << 20):  # as training changes all of a tensor
        changed = bytearray(data)
        changed[begin : begin + (1 << 20)] = bytes(byte ^ 1 for byte in changed[begin : begin + (1 << 20)])
        file.write_bytes(changed)
        assert hash_source(file) != found


def test_containers_of_earlier_releases_are_compared_by_their_own_digest(made, caplog):
    """They have digests of the ends of files; a conversion to the same folder finds them complete, too."""
    source, packed = made
    values = containers.read_json(packed)
    old = hash_source(source / "model.safetensors", ENDS_HASH)
    values["source"] |= {"hash": ENDS_HASH, "files": [[old.name, old.size, old.digest]]}
    containers.write_json(packed, values)
    assert PackedContainer(packed).manifest.source_hash == ENDS_HASH
    assert said(caplog, source, packed) == []
    tiny_models.rewrite(source, lambda tensors: {k: t + 1 for k, t in tensors.items()})
    assert STALE in said(caplog, source, packed)[0]
    values["source"]["hash"] = "of a later release"
    containers.write_json(packed, values)
    assert said(caplog, source, packed) == []


def test_a_conversion_finds_an_old_container_complete(tmp_path):
    source = containers.RandomExperts(tmp_path / "source")
    plan = containers.plan_for(source, tmp_path / "out")
    old = plan.hashed(ENDS_HASH)
    from kt_sft.convert.run import convert as write

    write(source, old)
    values = containers.read_json(tmp_path / "out")
    values["source"]["hash"] = ENDS_HASH
    containers.write_json(tmp_path / "out", values)
    assert finished_manifest(plan).identity == old.identity


def test_model_directory_of_a_gguf_file_follows_the_file(tmp_path, monkeypatch, caplog):
    """Made again where size and time are those of before; a container of the file's earlier state is named."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    plain = tiny_models.build("qwen3_moe", tmp_path / "plain")
    file = gguf_models.write_model(plain, tmp_path / "m.gguf")
    convert(file, tmp_path / "packed")
    first = gguf_model.model_directory(GgufIndex.from_path(file))
    assert said(caplog, file, tmp_path / "packed") == []
    before, (_, tensors) = file.stat(), contents(file)
    head, name = tensors["output.weight"][2].tobytes(), "lm_head.weight"
    data = file.read_bytes()
    begin = data.index(head)
    file.write_bytes(data[:begin] + bytes(len(head)) + data[begin + len(head) :])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = gguf_model.model_directory(GgufIndex.from_path(file))
    assert first != second
    assert (
        load_file(first / "model.safetensors")[name].any() and not load_file(second / "model.safetensors")[name].any()
    )
    (line,) = said(caplog, file, tmp_path / "packed")
    assert STALE in line and f"{file} has other content" in line
    file.unlink()
    with pytest.raises(FormatError):
        kt_sft.load_model(file, KTConfig(**CONFIG))
