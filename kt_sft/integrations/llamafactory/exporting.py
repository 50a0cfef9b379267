"""`llamafactory-cli export`: adapters are merged file by file, as `kt-sft merge` does it, without loading the model."""

from __future__ import annotations

import functools
import logging
import os
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kt_sft.errors import ConfigError
from kt_sft.formats.overwriting import saved_into
from kt_sft.integrations.merge.checkpoint import MergedCheckpoint
from kt_sft.integrations.merge.safetensors import write_merged
from kt_sft.integrations.peft.adapter_dir import local_adapter_dir
from kt_sft.integrations.transformers.base_model import meta_model
from kt_sft.integrations.transformers.saving import parse_size
from kt_sft.progress import progress_bar

logger = logging.getLogger(__name__)


def merges_files(model_args: Any) -> bool:
    """Whether an export can be made of the checkpoint's own files: all of it lies in one directory, unchanged."""
    path = model_args.model_name_or_path
    has_own_experts = getattr(model_args, "kt_weight_path", None) is None
    has_own_experts = has_own_experts and getattr(model_args, "kt_expert_checkpoint_path", None) is None
    return bool(model_args.export_dir) and os.path.isdir(path) and has_own_experts and not may_grow(model_args)


def may_grow(model_args: Any) -> bool:
    """Whether LLaMA-Factory may give the loaded model another vocabulary than its config says."""
    return any(getattr(model_args, key, None) for key in ("resize_vocab", "add_tokens", "add_special_tokens"))


def open_merged(model_args: Any, **hub: Any) -> MergedCheckpoint:
    """The checkpoint and its adapters, compared with one another; reads the adapters, and headers of the checkpoint.

    Raises:
        KTError: see `MergedCheckpoint`.
    """
    adapters = [
        local_adapter_dir(adapter, subfolder=model_args.adapter_folder, **hub)
        for adapter in model_args.adapter_name_or_path or []
    ]
    trusts = bool(getattr(model_args, "trust_remote_code", False))
    return MergedCheckpoint(model_args.model_name_or_path, adapters, trust_remote_code=trusts)


def merging_model(merged: MergedCheckpoint) -> nn.Module:
    """Stands for the loaded model in LLaMA-Factory's export: its config, and `save_pretrained`, which merges."""
    model = meta_model(merged.folder, trust_remote_code=merged.trust_remote_code)
    model.requires_grad_(False)

    def save_pretrained(self: nn.Module, save_directory: str, max_shard_size: int | str = "50GB", **_: Any) -> None:
        save_merged(merged, Path(save_directory), self.dtype, parse_size(max_shard_size))

    model.save_pretrained = types.MethodType(save_pretrained, model)
    return model


def save_merged(merged: MergedCheckpoint, target: Path, dtype: torch.dtype, limit_bytes: int) -> None:
    """Write the merged checkpoint into a directory that may hold an earlier one; aside, then in one step.

    Raises:
        ConfigError: the directory is one of those that are read.
        OutputError: no room, or it cannot be written.
    """
    for source in (merged.folder, *(adapter.source for adapter in merged.adapters)):
        if target.exists() and os.path.samefile(target, source):
            raise ConfigError(f"export_dir: {target} is read for the export; choose another")
    with saved_into(target, needed_bytes=merged.num_bytes(dtype)) as staging:
        bar = functools.partial(progress_bar, unit="tensor")
        write_merged(merged, staging, bar, dtype, limit_bytes)
    logger.info("merged %d adapters into %s", len(merged.adapters), target)
