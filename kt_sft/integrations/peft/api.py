"""The two calls a user makes. Both return a stock PeftModel."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from pathlib import Path

import peft
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, LoraConfig, PeftConfig, PeftModel
from torch import nn

from kt_sft.adapters import options
from kt_sft.adapters.folder import local_adapter
from kt_sft.compat.peft import BaseTunerLayer
from kt_sft.compat.transformers import renamed_on_loading
from kt_sft.errors import ConfigError, FormatError, as_ours, first_line
from kt_sft.formats.file_names import ADAPTER_CONFIG
from kt_sft.integrations.peft import reloading
from kt_sft.integrations.peft.adapter_dir import (
    in_running_form,
    read_adapter_config,
    saved_config,
)
from kt_sft.integrations.peft.binding import hidden_numel
from kt_sft.integrations.peft.injecting import check_kind, install, requesting
from kt_sft.integrations.peft.targets import expert_faults, expert_targets
from kt_sft.models.spec import iter_routed_experts

# Nothing here acts on the second, and the last two have no meaning for an adapter that is there.
_NOT_COMPARED = ("inference_mode", "auto_mapping", "init_lora_weights", "eva_config")
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def get_peft_model(
    model: nn.Module,
    lora_config: LoraConfig,
    *,
    expert_lora: bool | None = None,
    adapter_name: str = "default",
    **kwargs,
) -> PeftModel:
    """A new LoRA adapter on a model from `load_model`, routed experts included where asked.

    Args:
        model: a model with `RoutedExperts`; changed in place, as PEFT does.
        lora_config: PEFT's config; `target_modules` may be `"all"`, `"all-linear"`, or name the experts.
        expert_lora: LoRA on every routed expert; None follows `model.kt_config`, then the target (see
            `prepare_lora_config`).
        **kwargs: passed to `peft.get_peft_model`.
    Raises:
        ConfigError: an adapter is already there, or the config asks for what expert LoRA cannot do.
    """
    check_kind(lora_config, mixed=bool(kwargs.get("mixed")))
    _check_has_no_adapter(model)
    with requesting(expert_lora=expert_lora):
        return peft.get_peft_model(model, lora_config, adapter_name=adapter_name, **kwargs)


def load_adapter(
    model: nn.Module,
    adapter_dir: str | Path,
    is_trainable: bool = False,
    *,
    adapter_name: str = "default",
    config: PeftConfig | None = None,
    **kwargs,
) -> PeftModel:
    """A saved adapter on a model from `load_model`; takes the arguments of `PeftModel.from_pretrained`.

    The adapter is compared with the model before anything changes. Expert LoRA is in use if the adapter has it.

    Args:
        adapter_dir: what `save_pretrained` wrote, ours or plain PEFT's of any release; pairs per expert as vLLM reads
            them; a GGUF file; or a name on the hub.
        config: the adapter's own, as `AutoPeftModel` passes it.
        is_trainable: continue training it, with the dropout it was trained with; otherwise frozen and in eval mode.
    Raises:
        FormatError: the directory is missing, damaged, or made for another model.
        ConfigError: an adapter is already there, this one needs what expert LoRA cannot do, or `config` is not its own.
    """
    _check_has_no_adapter(model)
    hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
    source = local_adapter(adapter_dir, subfolder=kwargs.pop("subfolder", None), **hub)
    if config is not None and source.is_dir():
        _check_same(config, source)
    with in_running_form(model, source) as folder:
        return _load(model, folder, is_trainable, adapter_name, **kwargs)


def _load(model: nn.Module, folder: Path, is_trainable: bool, adapter_name: str, **kwargs) -> PeftModel:
    config = read_adapter_config(folder)
    targets = expert_targets(config, [name for name, _ in iter_routed_experts(model)])
    faults = expert_faults(config, targets, options.LOAD)
    if faults:
        raise ConfigError(f"{folder}: {fault}" for fault in faults)
    config.inference_mode = not is_trainable
    kwargs.setdefault("key_mapping", renamed_on_loading(model))
    build = {key: kwargs[key] for key in ("autocast_adapter_dtype", "low_cpu_mem_usage") if key in kwargs}
    _remove_offload_hooks(model)
    model_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    with requesting(is_saved=True), _saying_whose(folder):
        # Binds before the weights are read: accelerate, which PEFT may call then, would count placeholders as memory.
        peft_model = model_class(model, config, adapter_name, **build)
    # The class's own: what the bound one checks has been checked.
    result = model_class.load_adapter(peft_model, str(folder), adapter_name, is_trainable=is_trainable, **kwargs)
    if result.missing_keys:
        warnings.warn(f"{folder}: the adapter lacks {result.missing_keys}", stacklevel=2)
    return peft_model


def _saying_whose(folder: Path) -> AbstractContextManager[None]:
    """What PEFT says of a config that it cannot build, as an error of the adapter."""

    def ours(error: BaseException) -> FormatError:
        return FormatError(folder / ADAPTER_CONFIG, f"PEFT cannot build its modules ({first_line(error)})")

    return as_ours(ours, (ValueError, TypeError, KeyError, AttributeError, NotImplementedError))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, the routed experts counted although `parameters()` does not show them."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters()) + hidden_numel(model)


def _check_same(config: PeftConfig, folder: Path) -> None:
    """A config other than the saved one would need other tensors, or compute other things with them."""
    ours, saved = config.to_dict(), saved_config(folder).to_dict()
    differing = [key for key in saved if key not in _NOT_COMPARED and (ours.get(key) or None) != (saved[key] or None)]
    if differing:
        raise ConfigError(
            f"config: expected what {folder} says itself, found another {', '.join(differing)}; leave config out"
        )


def _check_has_no_adapter(model: nn.Module) -> None:
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigError("model: it already carries an adapter; call model.unload() or merge_and_unload() first")


def _remove_offload_hooks(model: nn.Module) -> None:
    """As `PeftModel.from_pretrained` does for models that accelerate has spread over devices."""
    if {"cpu", "disk"} & set((getattr(model, "hf_device_map", None) or {}).values()):
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(model)


install(load_adapter, reloading.load_adapter)
