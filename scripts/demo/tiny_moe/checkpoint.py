"""Writes a checkpoint folder as a whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kt_sft.formats.staging import new_path

MANIFEST = "tiny_moe.json"
_SHARD_BYTES = 200 * 10**6  # several shards even for this small model: the loader's usual case


def is_complete(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether `folder` holds a finished checkpoint of exactly this recipe (the manifest is written last)."""
    try:
        return json.loads((folder / MANIFEST).read_text()) == recipe
    except (OSError, ValueError):
        return False


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`, which takes its place only when the block ends without an error."""
    with new_path(folder, is_file=False, replaces=True) as aside:
        yield aside


def write_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> int:
    """Streams named tensors into safetensors shards with an index; returns the number of parameters."""
    num_shards = 0
    weight_map: dict[str, int] = {}
    pending: dict[str, Tensor] = {}
    num_parameters = total_bytes = pending_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes, num_shards
        save_file(pending, folder / f"shard-{num_shards}", metadata={"format": "pt"})
        num_shards += 1
        pending, pending_bytes = {}, 0

    for name, tensor in tensors:
        tensor = tensor.to(dtype).contiguous()
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > _SHARD_BYTES:
            flush()
        pending[name] = tensor
        weight_map[name] = num_shards
        pending_bytes += size
        total_bytes += size
        num_parameters += tensor.numel()
    flush()
    names = [f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)]
    for i, name in enumerate(names):
        (folder / f"shard-{i}").rename(folder / name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": {k: names[i] for k, i in weight_map.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return num_parameters


def write_manifest(folder: Path, recipe: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(recipe, indent=2) + "\n")
