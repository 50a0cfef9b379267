"""A saved adapter into a model that carries one: resuming, the best checkpoint at the end, a user's `load_adapter`."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import nn

from kt_sft.adapters.tensor_file import PREFIX, TensorFile
from kt_sft.errors import FormatError
from kt_sft.integrations.peft.adapter_dir import (
    check_adapter,
    in_running_form,
    local_adapter_dir,
    read_adapter_config,
)
from kt_sft.integrations.peft.injecting import requesting
from kt_sft.integrations.peft.unwrapped import plain_name
from kt_sft.integrations.transformers.swapping import swap_experts
from kt_sft.models.spec import iter_routed_experts

Shapes = Mapping[str, tuple[int, ...]]
_HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def load_adapter(
    peft_model: PeftModel,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    is_trainable: bool = False,
    **kwargs: Any,
) -> Any:
    """PEFT's `load_adapter` for a model whose expert LoRA is bound: other forms are converted, and nothing is left out.

    PEFT itself passes over tensors that it does not know and leaves those that are missing as they are.

    Raises:
        FormatError: missing, damaged, made for another model, or other tensors than the adapter of this name has.
    """
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
    source = local_adapter_dir(model_id, subfolder=kwargs.pop("subfolder", None), **hub)
    bare = bare_twin(peft_model.get_base_model())
    check_adapter(bare, source)
    with in_running_form(bare, source) as folder:
        if adapter_name in peft_model.peft_config:
            check_same_tensors(
                source, folder, adapter_shapes(peft_model, adapter_name), peft_model.peft_config[adapter_name]
            )
        return type(peft_model).load_adapter(peft_model, str(folder), adapter_name, is_trainable, **kwargs)


def bare_twin(base: nn.Module) -> nn.Module:
    """A model of `load_model` once more, on the meta device, without the layers that PEFT has put between."""
    experts = {plain_name(name): module for name, module in iter_routed_experts(base)}
    with torch.device("meta"):
        twin = type(base)(copy.deepcopy(base.config))
    formats = {name: e.formats if e.weight_format == "gguf" else e.weight_format for name, e in experts.items()}
    swap_experts(twin, {name: e.spec for name, e in experts.items()}, base.kt_config, formats)
    return twin


def untrained_twin(model: nn.Module, source: Path) -> PeftModel:
    """A model that is about to go on with a saved adapter, with the adapter's modules and without its numbers.

    Args:
        model: without weights; it is changed in place.
        source: of any form.
    """
    with in_running_form(model, source) as folder:
        config = read_adapter_config(folder)
    config.inference_mode = False
    with requesting(is_saved=True), torch.device("meta"):
        return PeftModel(model, config)


def adapter_shapes(peft_model: PeftModel, adapter_name: str = "default") -> dict[str, tuple[int, ...]]:
    """Shapes of what `save_pretrained` would write, by the names that `TensorFile` gives."""
    state = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
    return {name.removeprefix(PREFIX): tuple(tensor.shape) for name, tensor in state.items()}


def check_same_tensors(source: Path, folder: Path, expected: Shapes, config: LoraConfig) -> None:
    """Whether a saved adapter has just the tensors of an adapter that is in use.

    Args:
        source: names the adapter in messages.
        folder: the same, in the running form.
        expected: of `adapter_shapes`.
        config: the config that `expected` was built with.
    Raises:
        FormatError: one line with the first difference.
    """
    saved, there = TensorFile(folder), read_adapter_config(folder)
    remedy = "load it with the LoRA settings of the run that wrote it"
    if there.r != config.r:
        raise FormatError(source, "adapter: lora_rank", expected=config.r, found=there.r, remedy=remedy)
    lacking = [name for name in expected if name not in saved]
    further = [name for name in saved if name not in expected and ".lora_" in name]
    if lacking or further:
        what = "trained here, not in it" if lacking else "in it, not trained here"
        names = sorted({plain_name(name.partition(".lora_")[0]) for name in lacking or further})
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise FormatError(
            source, "adapter: other modules", expected="those of this run", found=f"{what}: {names[0]}{more}",
            remedy=f"{remedy} (lora_target, use_dora, kt_expert_lora)",
        )  # fmt: skip
    for name, shape in expected.items():
        if saved.shape(name) != shape:
            raise FormatError(
                source, f"adapter: {name}", expected=list(shape), found=list(saved.shape(name)), remedy=remedy
            )
