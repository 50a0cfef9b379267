"""A merged checkpoint as safetensors files beside the source's config and whatever else lies there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from kt_sft.formats.safetensors_index import SINGLE_NAME
from kt_sft.formats.safetensors_writer import put_index, write
from kt_sft.formats.staging import put_copy, put_json
from kt_sft.integrations.merge.checkpoint import MergedCheckpoint
from kt_sft.integrations.transformers.model_files import untie
from kt_sft.progress import Bar

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def write_merged(
    merged: MergedCheckpoint,
    folder: Path,
    bar: Bar,
    dtype: torch.dtype | None = None,
    limit_bytes: int | None = None,
) -> None:
    """Weights shard by shard, the source's config and whatever else lies beside.

    Args:
        dtype: of the weights; None: as each is stored, quantised ones in bf16.
        limit_bytes: of a shard, but for single tensors that are larger; None: shards as the source has them.
    """
    shards = merged.shards() if limit_bytes is None else merged.shards_of(limit_bytes, dtype)
    names = list(shards) if len(shards) > 1 else [SINGLE_NAME]
    weight_map: dict[str, str] = {}
    total = 0
    with bar("Merging", len(merged.keys)) as move:
        done = 0
        for name, keys in zip(names, shards.values(), strict=True):
            plan = [merged.planned(key, dtype) for key in keys]

            def pieces(keys: list[str] = keys, before: int = done) -> Iterator[Tensor]:
                for number, key in enumerate(keys, 1):
                    yield from merged.pieces(key, merged.dtype(key, dtype))
                    move(before + number, len(merged.keys), key)

            write(folder / name, plan, pieces())
            merged.index.close()
            done += len(keys)
            total += sum(tensor.num_bytes for tensor in plan)
            weight_map |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        put_index(folder, weight_map, total)
    copy_beside(merged.folder, folder, dtype, is_untied=merged.is_untied)


def copy_beside(source: Path, folder: Path, dtype: torch.dtype | None = None, *, is_untied: bool = False) -> None:
    """config.json, without the quantisation that is gone, and the other small files of a model directory.

    Args:
        is_untied: whether the head is no longer the embedding.
    """
    for path in sorted(source.iterdir()):
        is_weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and not (folder / path.name).exists():
            put_copy(path, folder)
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for part in (values, values.get("text_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
            for name in ("dtype", "torch_dtype"):
                if dtype is not None and name in part:
                    part[name] = str(dtype).removeprefix("torch.")
    if is_untied:
        untie(values)
    put_json(folder / "config.json", values)
