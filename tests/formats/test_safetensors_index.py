"""Reading and writing safetensors files: damage is found from headers, slices are read without the rest."""

from __future__ import annotations

import json
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from kt_sft.errors import FormatError
from kt_sft.formats.safetensors_index import INDEX_NAME, SafetensorsIndex
from kt_sft.formats.safetensors_writer import PlannedTensor, write


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 5, generator=generator),
        "b.fused": torch.randn(4, 6, 7, generator=generator).to(torch.bfloat16),
        "c": torch.randn(2, generator=generator),
    }


@pytest.fixture
def sharded(tmp_path, tensors):
    save_file({"a": tensors["a"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({k: tensors[k] for k in ("b.fused", "c")}, tmp_path / "model-00002-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors"} | dict.fromkeys(
        ["b.fused", "c"], "model-00002-of-00002.safetensors"
    )
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": files}))
    return tmp_path


def test_sharded_and_single_files_give_equal_tensors(sharded, tensors, tmp_path_factory):
    single = tmp_path_factory.mktemp("single")
    save_file(tensors, single / "model.safetensors")
    for directory in (sharded, single):
        with SafetensorsIndex.from_directory(directory) as index:
            assert set(index) == set(tensors) and len(index) == 3 and "a" in index
            for name, value in tensors.items():
                assert torch.equal(index.read(name), value)


def test_single_file_goes_before_an_index(sharded, tensors):
    """transformers takes it so: what is trained has to be what it loads."""
    save_file({"a": tensors["a"] + 1}, sharded / "model.safetensors")
    with SafetensorsIndex.from_directory(sharded) as index:
        assert list(index) == ["a"] and torch.equal(index.read("a"), tensors["a"] + 1)


def test_slice_of_a_fused_tensor_equals_the_slice(sharded, tensors):
    with SafetensorsIndex.from_directory(sharded) as index:
        part = index.read("b.fused", (2, slice(3, 6)))
        assert part.stride(-1) == 1
        assert torch.equal(part, tensors["b.fused"][2, 3:6])
        assert torch.equal(index.read("b.fused", (1,)), tensors["b.fused"][1])


def test_tensors_outlive_the_index(sharded, tensors):
    index = SafetensorsIndex.from_directory(sharded)
    part = index.read("a")
    index.close()
    assert torch.equal(part, tensors["a"])


def test_missing_directory(tmp_path):
    with pytest.raises(FormatError, match=r"nowhere: model directory: expected a directory, found nothing"):
        SafetensorsIndex.from_directory(tmp_path / "nowhere")


def test_directory_without_safetensors_names_what_it_has(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"found pytorch_model\.bin; use a checkpoint in safetensors"):
        SafetensorsIndex.from_directory(tmp_path)


def test_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match=r"expected 2 shards, found 1 \(missing: model-00002-of-00002\.safetensors\)"):
        SafetensorsIndex.from_directory(sharded)


@pytest.mark.parametrize("cut_bytes", [1, 200])
def test_truncated_shard_says_both_sizes(sharded, cut_bytes):
    shard = sharded / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-cut_bytes])
    with pytest.raises(
        FormatError, match=rf"truncated file: expected {len(data)} bytes, found {len(data) - cut_bytes} bytes; download"
    ):
        SafetensorsIndex.from_directory(sharded)


def test_truncated_header(sharded):
    shard = sharded / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(FormatError, match="truncated file"):
        SafetensorsIndex.from_directory(sharded)


@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1", struct.pack("<Q", 4) + b"oops", struct.pack("<Q", 2) + b"[]"],
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"header (length )?at byte|truncated"):
        SafetensorsIndex.from_directory(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', "{}"])
def test_damaged_index_is_refused(tmp_path, content):
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(FormatError, match=INDEX_NAME.replace(".", r"\.")):
        SafetensorsIndex.from_directory(tmp_path)


def test_tensor_of_the_index_that_its_shard_lacks(sharded):
    text = (sharded / INDEX_NAME).read_text().replace('"c"', '"d"')
    (sharded / INDEX_NAME).write_text(text)
    with pytest.raises(FormatError, match=r"00002-of-00002\.safetensors: tensor d: expected listed .* found missing"):
        SafetensorsIndex.from_directory(sharded)


def test_expect_checks_presence_shape_and_dtype(sharded):
    index = SafetensorsIndex.from_directory(sharded)
    assert index.expect("a", (3, 5), ("F32",)).shape == (3, 5)
    with pytest.raises(FormatError, match=r"tensor x: expected present, found missing"):
        index.expect("x", (1,))
    with pytest.raises(
        FormatError, match=r"00001-of-00002\.safetensors: tensor a: expected shape \[5, 3\], found \[3, 5\]"
    ):
        index.expect("a", (5, 3))
    with pytest.raises(FormatError, match=r"tensor a: expected dtype BF16, found F32; convert"):
        index.expect("a", (3, 5), ("BF16",))


def test_one_tensor_in_two_shards_is_refused(tmp_path, tensors):
    for number in (1, 2):
        save_file({"a": tensors["a"]}, tmp_path / f"{number}.safetensors")
    with pytest.raises(FormatError, match=r"2\.safetensors: tensor a: .* also in 1\.safetensors"):
        SafetensorsIndex.from_files([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])


@pytest.mark.parametrize("there", ["file", "link", "hanging link"])
def test_writer_leaves_what_is_there(tmp_path, there):
    out, victim = tmp_path / "out.safetensors", tmp_path / "victim"
    if there != "hanging link":
        (victim if there == "link" else out).write_text("only copy")
    if there != "file":
        out.symlink_to(victim)
    with pytest.raises(FileExistsError):
        write(out, [PlannedTensor("a", "torch.float32", (1,))], [torch.zeros(1)])
    assert victim.exists() == (there == "link") and (there == "hanging link" or out.read_text() == "only copy")


def test_written_file_is_read_by_safetensors(tmp_path, tensors):
    plan = [PlannedTensor(name, str(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
    pieces = [tensors["a"], *tensors["b.fused"], tensors["c"]]
    write(tmp_path / "out.safetensors", plan, pieces)
    loaded = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ([1, 2], "tensor a: expected 8 bytes, got 12"),
        ([2], "tensor b: expected 4 bytes, got 0"),
        ([3], "tensor a: expected 8 bytes, got 12"),
        ([1, 1, 1, 5], "expected the tensors of the plan, got 20 bytes more"),
    ],
)
def test_writer_refuses_pieces_that_do_not_add_up(tmp_path, sizes, match):
    plan = [PlannedTensor(name, "torch.float32", shape) for name, shape in (("a", (2,)), ("none", (0,)), ("b", (1,)))]
    write(tmp_path / "out.safetensors", plan, map(torch.zeros, [1, 1, 0, 1]))
    with pytest.raises(ValueError, match=match):
        write(tmp_path / "other.safetensors", plan, map(torch.zeros, sizes))
    with pytest.raises(ValueError, match="every tensor is once, got 1 more"):
        write(tmp_path / "out.safetensors", [*plan, plan[0]], map(torch.zeros, [2, 1, 2]))


@pytest.mark.parametrize("shape", [[1 << 62] * 50000, [1] * 9, [0, 1 << 63]])
def test_shapes_that_no_tensor_has(tmp_path, shape):
    """The first would take half a minute to multiply."""
    header = json.dumps({"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    begun = time.monotonic()
    with pytest.raises(FormatError, match=r"header at byte 8: .* axes, \d+ long at most"):
        SafetensorsIndex.from_directory(tmp_path)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("dtype", ["", " F32", "F33"])
def test_a_dtype_that_nobody_knows_is_refused_when_the_file_is_opened(tmp_path, dtype):
    header = json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(FormatError, match="header at byte 8: expected what the installed safetensors library reads"):
        SafetensorsIndex.from_directory(tmp_path)
