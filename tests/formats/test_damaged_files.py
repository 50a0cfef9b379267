"""Faults that the fuzzer found in readers of headers, each by the smallest file that has it."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from kt_sft.errors import FormatError, KTError, UnsupportedModel
from kt_sft.formats import training_checkpoint
from kt_sft.formats.quantized_index import QuantizedIndex, read_quantization
from kt_sft.formats.safetensors_index import INDEX_NAME, SINGLE_NAME, SafetensorsIndex
from kt_sft.integrations.llamafactory import resuming

SCHEME = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def index_of(folder, **values):
    save_file({"x": torch.ones(3)}, folder / "a.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": "a.safetensors"}, **values}))
    return folder


@pytest.mark.parametrize(
    "values",
    [
        "fp8",
        3,
        {"quant_method": ["fp8"]},
        {"quant_method": "x" * 5000},
        {"quant_method": "fp8", "weight_block_size": [1] * 5000},
        {**PACKED, "config_groups": {"a": "b"}},
        {**PACKED, "config_groups": {"a": {"weights": {**SCHEME, "group_size": [32]}}}},
        {**PACKED, "config_groups": {"a": {"weights": SCHEME}, "b": {"weights": {**SCHEME, "group_size": 64}}}},
    ],
)
def test_quantization_configs_of_other_types_are_one_line(values):
    with pytest.raises(UnsupportedModel) as error:
        read_quantization(values, "config.json")
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


def test_names_of_shards_that_no_filesystem_takes_are_refused(tmp_path):
    with pytest.raises(FormatError, match="a file beside the index"):
        SafetensorsIndex.from_directory(index_of(tmp_path, weight_map={"x": "a" * 5000}))


@pytest.mark.parametrize("metadata", [3, None, [], "x"])
def test_metadata_of_an_index_is_an_object(metadata, tmp_path):
    with pytest.raises(FormatError, match="metadata: expected an object"):
        SafetensorsIndex.from_directory(index_of(tmp_path, metadata=metadata))


def test_metadata_is_missed_where_transformers_misses_it(tmp_path):
    SafetensorsIndex.from_directory(index_of(tmp_path)).close()
    with pytest.raises(FormatError, match="metadata: expected an object"):
        SafetensorsIndex.from_directory(tmp_path, needs_metadata=True)


def test_a_dtype_that_the_library_does_not_make_tensors_of_is_one_line(tmp_path):
    header = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / SINGLE_NAME).write_bytes(struct.pack("<Q", len(header)) + header + b"abc")
    with pytest.raises(KTError), SafetensorsIndex.from_directory(tmp_path) as index:
        index.read("x")


@pytest.mark.parametrize(
    "header",
    [
        '{"__metadata__": []}',
        '{"__metadata__": {"a": 1}}',
        '{"__metadata__": {"a": NaN}}',
        '{"__metadata__": {"a": "\\ud800"}}',
    ],
)
def test_what_the_safetensors_library_refuses_is_refused_with_the_header(header, tmp_path):
    raw = header.encode()
    (tmp_path / SINGLE_NAME).write_bytes(struct.pack("<Q", len(raw)) + raw)
    with pytest.raises(FormatError, match="header at byte 8"):
        SafetensorsIndex.from_directory(tmp_path)


def test_packed_int4_of_another_dtype_is_refused(tmp_path):
    tensors = {"x.weight_packed": torch.ones(2, 4), "x.weight_scale": torch.ones(2, 1)}
    save_file(tensors, tmp_path / SINGLE_NAME)
    groups = {"a": {"weights": SCHEME}}
    quantization = read_quantization({**PACKED, "config_groups": groups}, "config.json")
    with pytest.raises(FormatError, match="expected I32"):
        QuantizedIndex(SafetensorsIndex.from_directory(tmp_path), quantization)


def checkpoint(folder):
    (folder / "trainer_state.json").write_text("{}")
    (folder / "adapter_config.json").write_text("{}")
    save_file({"x": torch.ones(3)}, folder / "adapter_model.safetensors")
    assert training_checkpoint.find_fault(folder) is None
    return folder


def test_a_pipe_in_a_checkpoint_is_not_waited_for(tmp_path):
    os.mkfifo(checkpoint(tmp_path) / "rng_state.pth")
    assert training_checkpoint.find_fault(tmp_path)
    (tmp_path / "rng_state.pth").unlink()
    (tmp_path / "trainer_state.json").unlink()
    os.mkfifo(tmp_path / "trainer_state.json")
    assert training_checkpoint.find_fault(tmp_path)


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a" * 5000, b"..", b"../x", b"/", b".", b"", b"a\0b"])
def test_the_folder_of_deepspeed_is_one_in_the_checkpoint(name, tmp_path):
    (checkpoint(tmp_path) / "latest").write_bytes(name)
    assert "latest" in training_checkpoint.find_fault(tmp_path)


@pytest.mark.parametrize(
    "state",
    [
        {"state": 3, "param_groups": []},
        {"state": {}, "param_groups": [3]},
        {"state": {}, "param_groups": [{"params": 2.5}]},
        {"state": {0: {"exp_avg": "x"}, "a": {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]},
        [1],
    ],
)
def test_an_optimizer_state_of_other_types_is_passed_over(state, tmp_path):
    torch.save(state, tmp_path / "optimizer.pt")
    torch.save({"base_lrs": torch.ones(3)}, tmp_path / "scheduler.pt")
    found = resuming.read_optimizer(tmp_path)
    assert found is None or not found.shapes
    assert resuming._rates(tmp_path, found) == []
