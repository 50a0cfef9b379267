"""Saving a complete checkpoint: transformers writes its part, the experts are unpacked and written one at a time."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kt_sft.errors import ConfigError, FormatError
from kt_sft.formats.finite import is_finite
from kt_sft.formats.overwriting import saved_into
from kt_sft.formats.safetensors_index import INDEX_NAME, SafetensorsIndex
from kt_sft.formats.safetensors_writer import PlannedTensor, in_shards, put_index, write
from kt_sft.formats.staging import put_json
from kt_sft.integrations.transformers.base_model import expert_shapes
from kt_sft.integrations.transformers.model_files import untie
from kt_sft.models.expert_keys import PROJECTIONS, ExpertPart, KeyMap
from kt_sft.models.layout import ExpertsSpec
from kt_sft.models.spec import iter_routed_experts
from kt_sft.nn.packed_linear import has_rounded_linears, saving_packed_weights
from kt_sft.progress import progress_bar

logger = logging.getLogger(__name__)

# Of the weights, rel-L2, for normally distributed ones (docs/numerics.md).
FORMAT_ERRORS = {"int8": "0.9 %", "int4": "8 to 10 %", "rawint4": "8 to 10 %", "gguf": "0.2 to 0.9 %"}
_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}

_Part = tuple[nn.Module, ExpertPart]


def save_full_model(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    *,
    max_shard_size: int | str = "50GB",
    save_original_format: bool = True,
    **save_kwargs: Any,
) -> None:
    """Write config, weights and experts so that stock `from_pretrained` reads them; also `model.save_pretrained`.

    Files are written aside and take their places when all are complete, in one step. Experts have the keys of the
    checkpoint that the model came from and the model's dtype. Memory: one expert and the weights of packed linear
    layers beside the model. INT8 and INT4 experts are read from the checkpoint again, merged adapters included; if it
    is gone, what is packed is written and a warning says so, as it does for linear layers in int8.

    Args:
        save_kwargs: further arguments of transformers' `save_pretrained`.
    Raises:
        ConfigError: adapters are still attached, or an argument that this writer does not have.
        FormatError: a weight that is not finite; nothing is written then.
    """
    for name in ("push_to_hub", "variant"):
        if save_kwargs.pop(name, None):
            raise ConfigError(
                f"save_pretrained: {name} is not supported with experts in kernels; save, then upload the folder"
            )
    _check_no_adapters(model)
    if not is_main_process:
        return
    limit_bytes = parse_size(max_shard_size)
    if has_rounded_linears(model):
        logger.warning(
            "linear layers are saved as int8 rounded them, with a relative error of about %s: load with "
            "cpu_linear: bf16 or off to save them exactly",
            FORMAT_ERRORS["int8"],
        )
    target = Path(save_directory)
    _check_finite(model, target)
    plan = _plan(model, save_original_format)
    with saved_into(target, needed_bytes=_num_bytes(model, plan)) as staging:
        with saving_packed_weights(model):
            type(model).save_pretrained(
                model, staging, max_shard_size=max_shard_size, save_original_format=save_original_format, **save_kwargs
            )
        if _is_untied(model):
            config = staging / "config.json"
            values = json.loads(config.read_text(encoding="utf-8"))
            untie(values)
            put_json(config, values)
        _write_experts(staging, target, plan, limit_bytes)
        _write_index(staging)


def _num_bytes(model: nn.Module, plan: list[tuple[PlannedTensor, list[_Part]]]) -> int:
    """About what a checkpoint takes; linear layers in int8 are written wider, tied weights once."""
    held = {p.data_ptr(): p.nbytes for p in model.parameters() if not p.is_meta}
    shown = [p for p in model.parameters() if p.is_meta or p.untyped_storage().nbytes() < p.nbytes]
    plain_bytes = sum(held.values()) - sum(p.nbytes for p in shown if not p.is_meta and p.data_ptr() in held)
    return max(0, plain_bytes) + sum(tensor.num_bytes for tensor, _ in plan)


def parse_size(size: int | str) -> int:
    """Bytes of a size such as `5GB` (decimal) or `5GiB` (binary).

    Raises:
        ConfigError: not a size.
    """
    if isinstance(size, int) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*", str(size).upper())
    bytes_ = int(float(match.group(1)) * _UNITS[match.group(2)]) if match and match.group(2) in _UNITS else 0
    if bytes_ < 1:
        raise ConfigError(f"max_shard_size: expected bytes or a size such as '5GB', found {size!r}")
    return bytes_


def _check_no_adapters(model: nn.Module) -> None:
    attached = [name for name, _ in iter_routed_experts(model) if "base_layer" in name.split(".")]
    attached = attached or [name for name, _ in model.named_parameters() if ".lora_A." in name]
    if attached:
        raise ConfigError(
            f"save_pretrained: expected a model without adapters, found one at {attached[0]}; "
            "call merge_and_unload() first, or save the adapter through the PeftModel"
        )


def _check_finite(model: PreTrainedModel, target: Path) -> None:
    """The experts are looked at while they are written."""
    for name, parameter in model.named_parameters():
        is_placeholder = parameter.is_meta or parameter.untyped_storage().nbytes() < parameter.nbytes
        if not is_placeholder and not is_finite(parameter.detach()):
            raise _not_finite(target, name)


def _not_finite(target: Path, name: str) -> FormatError:
    remedy = "save an earlier checkpoint of the training, or export in bfloat16 if float16 was too narrow"
    return FormatError(target, f"tensor {name}", expected="finite numbers", found="NaN or infinity", remedy=remedy)


def _is_untied(model: PreTrainedModel) -> bool:
    """Whether the config ties the head to the embedding and the model no longer does, as after merging an adapter that
    trained one of the two.
    """
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    pairs = [[model.get_submodule(name.rpartition(".")[0]).weight for name in pair] for pair in tied.items()]
    return any(one is not other and not torch.equal(one, other) for one, other in pairs)


def _plan(model: PreTrainedModel, save_original_format: bool) -> list[tuple[PlannedTensor, list[_Part]]]:
    """Every expert tensor of the files with the parts it is made of."""
    modules = dict(iter_routed_experts(model))
    specs: dict[str, ExpertsSpec] = {name: module.spec for name, module in modules.items()}
    dtype = model.dtype if model.dtype in (torch.float16, torch.float32) else torch.bfloat16
    shapes = expert_shapes(model, specs, dtype, save_original_format=save_original_format)
    layers = KeyMap(model, specs).layers(shapes, "save_pretrained", lambda key: shapes[key].shape)
    return [
        (PlannedTensor(key, str(dtype), tuple(shapes[key].shape)), [(modules[name], part) for part in parts])
        for name, layer in layers.items()
        for key, parts in layer.parts()
    ]


class _Unpacker:
    """Gives an expert's matrices as exactly as anybody still knows them; warns once where that is not exact."""

    def __init__(self) -> None:
        self._has_warned = False

    def __call__(self, experts: nn.Module, index: int) -> tuple[Tensor, Tensor, Tensor]:
        origin = experts.origin(index)
        reason = "their weights were set by load_expert"
        if origin is not None:
            try:
                return origin()
            except FormatError as error:
                reason = str(error)
        if not self._has_warned:
            name = experts.method.lower()
            logger.warning(
                "experts are saved as %s rounded them, with a relative error of about %s: %s",
                *(name.upper(), FORMAT_ERRORS[name], reason),
            )
            self._has_warned = True
        return experts.unpack_expert(index)


def _write_experts(folder: Path, target: Path, plan: list[tuple[PlannedTensor, list[_Part]]], limit_bytes: int) -> None:
    """Fill shards in layer order, each up to the limit."""
    shards = in_shards(plan, limit_bytes, lambda entry: entry[0].num_bytes)
    unpack = _Unpacker()
    with progress_bar("Writing expert shards", len(shards), unit="file") as move:
        for number, shard in enumerate(shards, 1):
            tensors = [tensor for tensor, _ in shard]
            parts = ((tensor.name, *part) for tensor, parts in shard for part in parts)
            pieces = _pieces(target, tensors[0].dtype, parts, unpack)
            file = folder / f"experts-{number:05d}.safetensors"
            write(file, tensors, pieces)
            move(number, len(shards), file.name)


def _pieces(
    target: Path, dtype: str, parts: Iterable[tuple[str, nn.Module, ExpertPart]], unpack: _Unpacker
) -> Iterator[Tensor]:
    unpacked: tuple[nn.Module, int] | None = None
    matrices: dict[str, Tensor] = {}
    for name, module, part in parts:
        if unpacked != (module, part.expert):
            matrices = dict(zip(PROJECTIONS, unpack(module, part.expert), strict=True))
            unpacked = (module, part.expert)
        if part.projection == "gate_up":
            matrix = module.spec.join_gate_up(matrices["gate"], matrices["up"])
        else:
            matrix = matrices[part.projection]
        matrix = matrix.mT.contiguous() if part.is_transposed else matrix
        matrix = matrix.to(getattr(torch, dtype.removeprefix("torch.")))
        if not is_finite(matrix):
            raise _not_finite(target, name)
        yield matrix


def _write_index(folder: Path) -> None:
    """Give all shards their final names and write the index over them."""
    (folder / INDEX_NAME).unlink(missing_ok=True)
    files = sorted(folder.glob("*.safetensors"), key=lambda file: (file.name.startswith("experts-"), file.name))
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, file in enumerate(files, 1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        index = SafetensorsIndex.from_files([file])
        weight_map.update(dict.fromkeys(index, final))
        total_bytes += file.stat().st_size
        # Two passes, since a final name may be that of a shard not yet renamed.
        file.rename(folder / f"{final}.new")
    for file in folder.glob("*.new"):
        file.rename(file.with_suffix(""))
    put_index(folder, weight_map, total_bytes)
