"""The GGUF reader: what is written is what is read, and every damaged file is one clear FormatError."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from gguf import GGUFReader, quants

from kt_sft.errors import FormatError
from kt_sft.formats.gguf import GgufIndex
from tests.helpers import gguf_files

METADATA = {
    "general.architecture": "qwen3moe",
    "a.flag": True,
    "a.count": 7,
    "a.long": ("u64", 1 << 40),
    "a.scale": 0.5,
    "a.list": [1, 2, 3],
    "a.names": ["x", "häs", ""],
    "a.nested": [[1, 2], [3]],
}
TENSORS = {
    "plain": gguf_files.random_blocks("F32", (5, 3)),
    "experts": gguf_files.random_blocks("Q4_K", (3, 7, 512)),
    "one": gguf_files.random_blocks("BF16", (33,)),
    "last": gguf_files.random_blocks("Q8_0", (2, 64)),
}


@pytest.fixture
def file(tmp_path):
    return gguf_files.write(tmp_path / "m.gguf", METADATA, TENSORS)


def same(index: GgufIndex) -> None:
    assert set(index) == set(TENSORS)
    for name, (kind, shape, data) in TENSORS.items():
        info = index.expect(name, shape)
        assert (info.type.name, info.num_bytes) == (kind, data.nbytes)
        assert np.array_equal(index.blocks(name).numpy().reshape(-1), data)
    kind, shape, data = TENSORS["experts"]
    assert np.array_equal(index.blocks("experts", (2,)).numpy(), data.reshape(3, 7, -1)[2])


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_everything_comes_back(tmp_path, alignment):
    index = GgufIndex.from_path(gguf_files.write(tmp_path / "m.gguf", METADATA, TENSORS, alignment=alignment))
    same(index)
    nested = index.metadata.pop("a.nested")
    assert [list(part) for part in nested] == [[1, 2], [3]]
    assert list(index.metadata.pop("a.list")) == [1, 2, 3]
    assert index.metadata.pop("general.alignment", alignment) == alignment
    assert index.metadata == {key: METADATA[key] for key in ("general.architecture", "a.flag", "a.count")} | {
        "a.long": 1 << 40,
        "a.scale": 0.5,
        "a.names": ["x", "häs", ""],
    }
    with index:
        kept = index.blocks("last")
    assert np.array_equal(kept.numpy().reshape(-1), TENSORS["last"][2])


def test_gguf_of_pypi_reads_the_same(file):
    """The writer of the tests makes real GGUF files."""
    index = GgufIndex.from_path(file)
    for tensor in GGUFReader(file).tensors:
        info = index.info(tensor.name)
        assert (tensor.data_offset, tensor.n_bytes) == (info.offset, info.num_bytes)


@pytest.mark.parametrize(("kind", "bound"), [("Q8_0", 0.006), ("Q4_0", 0.11), ("Q4_K", 0.09), ("Q6_K", 0.025)])
def test_quantisers_of_the_tests_are_sound(kind, bound):
    values = np.random.default_rng(0).normal(size=(11, 512)).astype(np.float32)
    _, _, data = gguf_files.encode(values, kind)
    from gguf import GGMLQuantizationType

    back = quants.dequantize(data.reshape(11, -1), GGMLQuantizationType[kind])
    assert np.linalg.norm(back - values) / np.linalg.norm(values) < bound


@pytest.mark.parametrize("start", ["directory", 1, 3])
def test_split_files(tmp_path, start):
    files = gguf_files.write_split(tmp_path, "m", METADATA, TENSORS, 3)
    index = GgufIndex.from_path(tmp_path if start == "directory" else files[start - 1])
    same(index)
    assert index.metadata["general.architecture"] == "qwen3moe"


def refused(path, match):
    with pytest.raises(FormatError, match=match) as caught:
        GgufIndex.from_path(path)
    assert "\n" not in str(caught.value)


def test_split_faults(tmp_path):
    files = gguf_files.write_split(tmp_path, "m", METADATA, TENSORS, 3)
    kept = files[1].read_bytes()
    files[1].write_bytes(files[2].read_bytes())
    refused(files[0], r"00002-of-00003.gguf: split.no and split.count: expected 1 and 3, .* found 2 and 3")
    files[1].unlink()
    refused(files[0], "split GGUF file: expected 3 parts beside each other, found 1 missing, first m-00002-of-00003")
    files[1].write_bytes(kept)
    part = {"split.no": ("u16", 1), "split.count": ("u16", 3)}
    gguf_files.write(files[1], part, {"plain": TENSORS["plain"]})
    refused(files[0], "tensor plain: expected one file holds it, found also in m-00001-of-00003")
    gguf_files.write(files[1], part, {"new": TENSORS["plain"], "more": TENSORS["plain"]})
    refused(files[0], "tensors of all parts: expected 4, found 5")


def test_paths(tmp_path, file):
    refused(tmp_path / "none.gguf", "GGUF file: expected a file, found nothing")
    assert len(GgufIndex.from_path(tmp_path)) == 4
    (tmp_path / "loop.gguf").symlink_to(tmp_path / "loop.gguf")
    refused(tmp_path / "loop.gguf", "GGUF file: expected a")
    (tmp_path / "loop.gguf").unlink()
    (tmp_path / "other.gguf").write_bytes(file.read_bytes())
    refused(tmp_path, "expected one model, found m.gguf, other.gguf; name the file")
    (tmp_path / "empty.gguf").touch()
    refused(tmp_path / "empty.gguf", "found an empty file")


def test_every_truncation_is_refused(file):
    whole = file.read_bytes()
    index = GgufIndex.from_path(file)
    begin = index.info("plain").offset
    end = index.info("last").offset + index.info("last").num_bytes
    index.close()
    for length in [*range(0, begin, 7), begin - 1, begin, end - 1]:
        file.write_bytes(whole[:length])
        refused(file, "m.gguf: ")
    file.write_bytes(whole[:end])  # padding after the last tensor is nobody's
    assert len(GgufIndex.from_path(file)) == 4


def patched(file, old: bytes, new: bytes):
    raw = file.read_bytes()
    assert raw.count(old) == 1 and len(old) == len(new)
    file.write_bytes(raw.replace(old, new))
    return file


def entry(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def test_headers_that_lie(file):
    good = file.read_bytes()

    def with_bytes(at, raw):
        file.write_bytes(good[:at] + raw + good[at + len(raw) :])
        return file

    huge = struct.pack("<Q", (1 << 64) - 1)
    refused(with_bytes(0, b"GGUG"), "magic at byte 0: expected GGUF, found b'GGUG'")
    refused(with_bytes(4, struct.pack("<I", 1)), "version at byte 4: expected 2 or 3, found 1")
    refused(with_bytes(4, struct.pack(">I", 3)), "byte order: expected little endian, found big endian")
    refused(with_bytes(8, huge), "number of tensors at byte 8: expected at most .* found 18446744073709551615")
    refused(with_bytes(16, huge), "number of metadata keys at byte 16: expected at most")
    refused(with_bytes(24, huge), "length of metadata key at byte 24: expected at most")
    at = good.index(entry("a.list")) + len(entry("a.list")) + 8
    refused(with_bytes(at, huge), rf"number of elements of a.list at byte {at}")
    at = good.index(entry("a.names")) + len(entry("a.names")) + 8
    refused(with_bytes(at, huge), rf"number of elements of a.names at byte {at}")
    refused(with_bytes(at - 4, struct.pack("<I", 13)), "type of a.names")
    at = good.index(entry("a.count")) + 8
    refused(with_bytes(at, b"\n\x1bcount" + struct.pack("<I", 13)), r"type of \\n\\x1bcount before byte")
    at = good.index(entry("a.flag")) + len(entry("a.flag")) + 4
    refused(with_bytes(at, b"\2"), r"a.flag at byte \d+: expected true \(1\) or false \(0\), found 2")


def test_directories_that_lie(file):
    good = file.read_bytes()
    at = good.index(entry("experts")) + len(entry("experts"))  # axes, sizes, type, offset

    def with_bytes(offset, raw):
        file.write_bytes(good[: at + offset] + raw + good[at + offset + len(raw) :])
        return file

    refused(with_bytes(0, struct.pack("<I", 5)), r"tensor experts at byte \d+, number of axes: expected 1 to 4")
    refused(with_bytes(4, struct.pack("<Q", 511)), r"inner axis: expected a multiple of 256 \(Q4_K\), found 511")
    refused(with_bytes(4, struct.pack("<Q", 1 << 63)), "axes: expected sizes that fit in")
    refused(with_bytes(12, struct.pack("<Q", 0)), "axes: expected sizes that fit in")
    refused(with_bytes(12, struct.pack("<Q", 6)), "offset of tensor one: expected .* where the one before it ends")
    refused(with_bytes(28, struct.pack("<I", 31)), "type: expected a type number that ggml has, found 31")
    refused(with_bytes(32, struct.pack("<Q", 1 << 63)), "offset of tensor")
    refused(with_bytes(32, struct.pack("<Q", 0)), "offset of tensor experts: expected 64, .* found 0")


def test_names_that_come_twice(tmp_path, file):
    twice = patched(file, entry("last"), entry("last")[:8] + b"onee"[:4])
    index = GgufIndex.from_path(twice)  # another name is fine
    assert "onee" in index
    names = {"aa": TENSORS["plain"], "ab": TENSORS["plain"]}
    file = gguf_files.write(tmp_path / "n.gguf", {"k.a": 1, "k.b": 2}, names)
    good = file.read_bytes()
    refused(patched(file, entry("ab"), entry("aa")), "tensor aa: expected once, found twice")
    file.write_bytes(good)
    refused(patched(file, entry("k.b"), entry("k.a")), r"metadata key at byte \d+: expected a new name, found 'k.a'")
    gguf_files.write(file, {"general.alignment": 24}, names)
    refused(file, "general.alignment: expected a power of two from 8")


def test_missing_tensor_and_wrong_shape(file):
    index = GgufIndex.from_path(file)
    with pytest.raises(FormatError, match="tensor none: expected present, found missing"):
        index.info("none")
    with pytest.raises(FormatError, match=r"tensor plain: expected shape \[3, 5\], found \[5, 3\]"):
        index.expect("plain", (3, 5))
