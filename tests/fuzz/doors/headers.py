"""Doors to what is read before any tensor: indexes, headers, manifests, journals, the state of a training."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from kt_sft.convert.run import _finished_layers, convert
from kt_sft.errors import FormatError
from kt_sft.formats import training_checkpoint
from kt_sft.formats.ggml_types import GGML_TYPE_BY_NUMBER
from kt_sft.formats.gguf import GgufIndex
from kt_sft.formats.packed import JOURNAL_NAME, MANIFEST_NAME, PackedContainer
from kt_sft.formats.quantized_index import QuantizedIndex, read_quantization
from kt_sft.formats.safetensors_index import INDEX_NAME, SINGLE_NAME, SafetensorsIndex
from kt_sft.integrations.transformers.model_files import open_checkpoint
from tests.fuzz.case import Door, Subject
from tests.fuzz.documents import Json, Lines, Plain, Tensors, TorchArchive
from tests.fuzz.gguf_document import Gguf, parse
from tests.helpers import gguf_files
from tests.helpers.containers import RandomExperts, make_container, plan_for
from tests.helpers.quantized_checkpoints import expand

_SHARDS = {
    "a.safetensors": {"x.weight": torch.arange(60.0).view(5, 12), "n": torch.ones(7), "e": torch.ones(0, 3)},
    "b.safetensors": {"y.weight": torch.arange(15).view(3, 5).bfloat16(), "i": torch.arange(6).view(1, 2, 3)},
}


def _sharded(_: Path) -> Subject:
    weight_map = {name: file for file, tensors in _SHARDS.items() for name in tensors}
    index = json.dumps({"metadata": {"total_size": 342}, "weight_map": weight_map}).encode()
    files = {file: Tensors(save(tensors)) for file, tensors in _SHARDS.items()}
    words = (*_SHARDS, *weight_map, "weight_map", "metadata", SINGLE_NAME, INDEX_NAME, ".", "../a.safetensors")
    return Subject({INDEX_NAME: Json(index, words), **files}, _read_safetensors, _check_safetensors)


def _single(_: Path) -> Subject:
    tensors = {name: tensor for part in _SHARDS.values() for name, tensor in part.items()}
    return Subject({SINGLE_NAME: Tensors(save(tensors, {"format": "pt"}))}, _read_safetensors, _check_safetensors)


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    with SafetensorsIndex.from_directory(folder) as index:
        found = {name: index.read(name) for name in index}
        for name, tensor in found.items():
            info = index.info(name)
            assert info.shape == tuple(tensor.shape)
            if tensor.dim() and tensor.shape[0]:
                assert torch.equal(_bytes(index.read(name, (slice(0, 1),))), _bytes(tensor[:1]))
        return found


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _check_safetensors(folder: Path, result: dict[str, Tensor]) -> None:
    """Against the format read step by step."""
    if (folder / SINGLE_NAME).is_file():
        files = {SINGLE_NAME}
    else:
        files = set(json.loads((folder / INDEX_NAME).read_text())["weight_map"].values())
    expected = dict(entry for file in files for entry in plain_safetensors(folder / file))
    assert result.keys() == expected.keys()
    for name, (_, shape, data) in expected.items():
        assert list(result[name].shape) == shape, name
        assert _bytes(result[name]).numpy().tobytes() == data, name


def plain_safetensors(file: Path) -> Iterator[tuple[str, tuple[str, list[int], bytes]]]:
    """Name, and dtype, shape and bytes of each tensor, by the letter of the format."""
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield name, (entry["dtype"], entry["shape"], raw[8 + length + begin : 8 + length + end])


def _quantized(values: dict[str, Any], tensors: dict[str, Tensor]) -> Subject:
    config = json.dumps({"quantization_config": values}).encode()
    words = ("fp8", "mxfp4", "compressed-tensors", "quant_method", "weight_block_size", "format", "config_groups", None)
    words = (*words, "pack-quantized", "weights", "group_size", [16, 32], [1, 1], [2**40, 2**40], [0, 32], 32, 64)
    names = [
        f"{name}{end}" for name in tensors for end in ("_scale", "_scale_inv", "_zero_point", "_blocks", "_scales")
    ]
    files = {"config.json": Json(config, words), SINGLE_NAME: Tensors(save(tensors), names)}
    return Subject(files, _read_quantized, _check_quantized)


def _fp8(_: Path) -> Subject:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(20, 40, generator=generator).to(torch.float8_e4m3fn)
    stack = torch.randn(2, 17, 33, generator=generator).to(torch.float8_e4m3fn)
    tensors = {"x.weight": w, "x.weight_scale_inv": torch.rand(2, 2, generator=generator), "n": torch.ones(7)}
    tensors |= {"s.weight": stack, "s.weight_scale_inv": torch.rand(2, 2, 2, generator=generator)}
    return _quantized({"quant_method": "fp8", "weight_block_size": [16, 32]}, tensors)


def _int4(_: Path) -> Subject:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (6, 8), generator=generator).int()
    scale = torch.rand(6, 2, generator=generator).bfloat16()
    tensors = {"x.weight_packed": words, "x.weight_scale": scale, "x.weight_shape": torch.tensor([6, 64])}
    tensors |= {"x.weight_zero_point": torch.zeros(1, 2, dtype=torch.int32), "n": torch.ones(7)}
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return _quantized(config, tensors)


def _mxfp4(_: Path) -> Subject:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 5, 3, 16), generator=generator).byte()
    scales = torch.randint(100, 140, (2, 5, 3), generator=generator).byte()
    return _quantized({"quant_method": "mxfp4"}, {"x_blocks": blocks, "x_scales": scales, "n": torch.ones(7)})


def _read_quantized(folder: Path) -> dict[str, Tensor]:
    with open_checkpoint(str(folder)) as index:
        found = {name: index.read(name) for name in index}
        assert all(index.info(name).shape == tuple(tensor.shape) for name, tensor in found.items())
        for name in index.quantized:
            assert torch.equal(index.read(name, (slice(0, 1),)).nan_to_num(), found[name][:1].nan_to_num())
        return found


def _check_quantized(folder: Path, result: dict[str, Tensor]) -> None:
    """Against the products in torch, from the raw tensors."""
    config = folder / "config.json"
    values = json.loads(config.read_text()).get("quantization_config") if config.is_file() else None
    quantization = read_quantization(values, folder)
    raw = _read_safetensors(folder)
    quantized = set(QuantizedIndex(SafetensorsIndex.from_directory(folder), quantization).quantized)
    for name, found in result.items():
        if name not in quantized:
            assert torch.equal(_bytes(found), _bytes(raw[name])), name
            continue
        if quantization.dtype == "F8_E4M3":
            codes, scale = raw[name].float(), raw[f"{name}_scale_inv"].float()
            block = quantization.block or tuple(codes.shape[-2:])
        elif quantization.dtype == "I4":
            words, scale = raw[f"{name}_packed"].int(), raw[f"{name}_scale"].float()
            codes = ((words[..., None] >> torch.arange(0, 32, 4)) & 15).flatten(-2).float() - 8
            block = quantization.block
        else:
            assert found.shape[-2] == raw[f"{name}_blocks"].shape[2] * 32
            wanted = _mxfp4_values(raw[f"{name}_blocks"], raw[f"{name}_scales"]).mT
            assert torch.equal(found.nan_to_num(), wanted.nan_to_num()), name
            assert torch.equal(found.isnan(), wanted.isnan()), name
            continue
        full = scale if scale.numel() == 1 else expand(scale, block, codes.shape)
        wanted = (codes * full).bfloat16()
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num()), name
        assert torch.equal(found.isnan(), wanted.isnan()), name


def _mxfp4_values(blocks: Tensor, scales: Tensor) -> Tensor:
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    numbers = torch.cat([numbers, -numbers]).double()
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
    scale = torch.where(scales == 255, torch.nan, torch.exp2(scales.double() - 127))  # of e8m0
    return (numbers[codes] * scale[..., None]).flatten(-2).bfloat16()


def _gguf(split: bool):
    def build(folder: Path) -> Subject:
        metadata = {
            "general.architecture": "x", "a.list": [1, 2], "a.names": ["x", "y"], "a.deep": [[1], [2]], "a.b": True,
            "a.u64": ("u64", 2**63), "a.f": 0.5,
        }  # fmt: skip
        kinds = {"one": ("F32", (5, 3)), "two": ("Q4_K", (3, 7, 512)), "three": ("IQ1_S", (2, 256)), "n": ("I8", (3,))}
        kinds |= {"four": ("BF16", (2, 2, 2, 2)), "five": ("MXFP4", (1, 32))}
        tensors = {name: gguf_files.random_blocks(*kind) for name, kind in kinds.items()}
        if split:
            files = gguf_files.write_split(folder, "m", metadata, tensors, 2)
        else:
            files = [gguf_files.write(folder / "m.gguf", metadata, tensors, alignment=64)]
        words = ("split.no", "split.count", "split.tensors.count", "general.alignment", 2**31, 32)
        return Subject({file.name: Gguf(file.read_bytes(), words) for file in files}, _read_gguf, _check_gguf)

    return build


def _read_gguf(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...], bytes]]]:
    with GgufIndex.from_path(folder) as index:
        found = {}
        for name in index:
            info = index.info(name)
            found[name] = (info.type.name, info.shape, index.blocks(name).numpy().tobytes())
            try:
                index.expect_numbers(name)
            except FormatError:
                continue
            assert tuple(index.read(name).shape) == info.shape
        return index.metadata, found


def _check_gguf(folder: Path, result: Any) -> None:
    """Against the format read step by step; one in eight also against PyPI's reader, which is slow."""
    metadata, found = result
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    keys: dict[str, Any] = {}
    for file in sorted(folder.glob("*.gguf")):
        raw = file.read_bytes()
        tree, data, _ = parse(raw)
        for name, extents, number, offset in tree["tensors"]:
            kind, shape = GGML_TYPE_BY_NUMBER[number], tuple(reversed(extents))
            num_bytes = math.prod(shape) // kind.block_elements * kind.block_bytes
            tensors[name] = (kind.name, shape, data[offset : offset + num_bytes])
        keys = {key: _plain(kind, value) for key, kind, value in tree["metadata"]} | keys
        if zlib.crc32(raw) % 8 == 0:
            _check_as_published(file, metadata, found)
    assert found == tensors
    assert metadata.keys() == keys.keys()
    for key, value in metadata.items():
        assert repr(_listed(value)) == repr(keys[key]), key


def _listed(value: Any) -> Any:
    """A metadata value with lists in the place of arrays."""
    if isinstance(value, list):
        return [_listed(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _plain(kind: int, value: Any) -> Any:
    """A metadata value of `gguf_document.parse` as numbers, truth values, text and lists."""
    if kind == 9:
        return [_plain(value[0], each) for each in value[1]]
    return bool(value) if kind == 7 else value


def _check_as_published(file: Path, metadata: dict[str, Any], found: dict[str, Any]) -> None:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except Exception:  # it knows fewer types than ggml, and takes no text but UTF-8
        return
    for tensor in reader.tensors:
        kind, shape, data = found[tensor.name]
        assert tensor.tensor_type.name == kind, tensor.name
        assert tuple(reversed([int(extent) for extent in tensor.shape])) == shape, tensor.name
        assert tensor.data.tobytes() == data, tensor.name


def _container(folder: Path) -> Subject:
    packed = make_container(folder, "int4", 32)
    words = ("int8", "bf16", "int4", 0, 32, 64, 128, "layer-00000.bin", "layer-00001.bin", "silu", "gelu", 2**15, 4096)
    files: dict[str, Any] = {MANIFEST_NAME: Json((packed / MANIFEST_NAME).read_bytes(), words, _signed)}
    for name in ("layer-00000.bin", "layer-00001.bin"):
        files[name] = Plain((packed / name).read_bytes(), (0, 8, 16, 4095, 4096))
    return Subject(files, _read_container, _check_container)


def _signed(values: Any) -> Any:
    """A manifest with the checksum that belongs to it: the checks behind that one are to be met."""
    if not isinstance(values, dict) or "checksum" not in values:
        return values
    body = {key: value for key, value in values.items() if key != "checksum"}
    with contextlib.suppress(TypeError, ValueError, RecursionError):  # text that JSON has no value for
        values["checksum"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return values


def _read_container(folder: Path) -> dict[tuple[str, int], tuple[bytes, ...]]:
    with PackedContainer(folder) as container:
        found = {}
        for name, layer in container.manifest.layers.items():
            for expert in range(layer.num_experts):
                found[name, expert] = tuple(map(bytes, container.blobs(name, expert)))
        assert container.manifest.errors()
        list(container.check_blobs())
        return found


def _check_container(folder: Path, result: dict[tuple[str, int], tuple[bytes, ...]]) -> None:
    """Against the files at the places that the manifest names, and their checksums."""
    layers = json.loads((folder / MANIFEST_NAME).read_bytes())["layers"]
    expected = {}
    for layer in layers:
        raw = (folder / layer["file"]).read_bytes()
        for expert, blobs in enumerate(layer["experts"]):
            expected[layer["name"], expert] = tuple(raw[offset : offset + size] for offset, size, *_ in blobs)
            assert all(zlib.crc32(raw[offset : offset + size]) == crc for offset, size, crc, _ in blobs)
    assert result == expected


def _journal(folder: Path) -> Subject:
    """What an interrupted conversion goes on with."""
    source = RandomExperts(folder / "source")
    plan = plan_for(source, folder / "whole", "int8")
    manifest = convert(source, plan)
    start = {"version": 1, "id": plan.identity, "weights": "INT8"}
    lines = [json.dumps(line).encode() for line in (start, *(layer.to_json() for layer in manifest.layers.values()))]
    files: dict[str, Any] = {JOURNAL_NAME: Lines(b"\n".join(lines) + b"\n", (1, 2, "INT8", "INT4", *plan.specs))}
    fixed = {layer.file: (folder / "whole" / layer.file).read_bytes() for layer in manifest.layers.values()}

    def read(place: Path) -> Any:
        return _finished_layers(plan_for(source, place, "int8"))

    def check(place: Path, layers: Any) -> None:
        for name, layer in layers.items():
            assert name in plan.specs and os.path.getsize(place / layer.file) == layer.file_bytes

    return Subject(files, read, check, fixed, odd=())


def _training_state(_: Path) -> Subject:
    weights = Tensors(save({"base_model.model.q.lora_A.weight": torch.ones(2, 3)}))
    state = {"global_step": 3, "epoch": 0.5, "log_history": [{"loss": 1.0, "step": 1}], "best_metric": None}
    archive = TorchArchive({"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]})
    files: dict[str, Any] = {
        "checkpoint-3/trainer_state.json": Json(json.dumps(state).encode()),
        "checkpoint-3/adapter_config.json": Json(b'{"peft_type": "LORA", "r": 2}'),
        "checkpoint-3/adapter_model.safetensors": weights,
        "checkpoint-3/optimizer.pt": archive,
        "checkpoint-3/scheduler.pt": archive,
        "checkpoint-3/rng_state.pth": archive,
        "checkpoint-3/latest": Plain(b"global_step3"),
        "checkpoint-3/global_step3/mp_rank_00_model_states.pt": archive,
    }
    return Subject(files, _read_state, lambda folder, result: None)


def _read_state(folder: Path) -> Any:
    found, broken = training_checkpoint.newest_whole(folder)
    assert (found is None) == bool(broken)
    assert all("\n" not in fault and len(fault) < 300 for fault in broken.values())
    for path in training_checkpoint.checkpoints(folder):
        training_checkpoint.num_ranks(path)
        training_checkpoint.is_deepspeed(path)
    return found


DOORS = (
    Door("safetensors", _single),
    Door("safetensors-index", _sharded),
    Door("fp8", _fp8),
    Door("int4", _int4),
    Door("mxfp4", _mxfp4),
    Door("gguf", _gguf(False)),
    Door("gguf-split", _gguf(True)),
    Door("container", _container),
    Door("journal", _journal),
    Door("training-state", _training_state),
)
