"""The reference model of DPO and KTO: what of the policy's configuration is its own.

LLaMA-Factory copies every model argument of the policy to it and replaces only the name, the adapter and the
quantisation. Keys that say how experts are held and computed go for both models. Keys that name files of the policy do
not: a reference reads its own checkpoint, unless it is the policy's base model itself.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

from torch import nn

from kt_sft import env
from kt_sft.errors import ConfigError, KTError
from kt_sft.formats.packed import is_container
from kt_sft.integrations.gguf.model import is_gguf_model
from kt_sft.integrations.llamafactory import args, autoload
from kt_sft.integrations.transformers.memory_check import bytes_outside_experts, check_memory_of_all, memory_needed
from kt_sft.integrations.transformers.model_files import find_config_file, read_config_file
from kt_sft.memory import MemoryEstimate
from kt_sft.models.spec import iter_routed_experts
from kt_sft.nn.routed_experts import WeightFormats

logger = logging.getLogger(__name__)

FILES_OF_THE_POLICY = ("kt_weight_path", "kt_expert_checkpoint_path")
OF_THE_REWARD = ("reward_model", "reward_model_adapters", "reward_model_quantization_bit")
_DEFAULT_REVISION = "main"


def patch_copies(model_arguments: type, use_model_directory: Callable[[Any], None]) -> None:
    """`ModelArguments.copyfrom`, by which LLaMA-Factory makes the arguments of reference and reward models.

    Args:
        use_model_directory: takes the directory that stands for a GGUF file; changes the arguments.
    """
    autoload.require(model_arguments, "copyfrom")
    stock_copy = model_arguments.copyfrom.__func__

    def copyfrom(cls: type, source: Any, **changes: Any) -> Any:
        copy = stock_copy(cls, source, **changes)
        if getattr(source, "kt_active", False) and changes.get("model_name_or_path"):
            _keep_own(copy, source, use_model_directory)
        return copy

    model_arguments.copyfrom = classmethod(copyfrom)


def check(
    model_args: Any, finetuning_args: Any, policy: nn.Module | None, check_inputs: Callable[[Any], nn.Module | None]
) -> None:
    """Look at the reference model as at the policy, before data is read.

    Args:
        policy: on the meta device, with our experts modules; None: nobody could look at it.
        check_inputs: what checked the policy.
    Raises:
        ConfigError: what loading the reference would raise, or keys that do not go together.
        NotEnoughMemory: both models do not fit beside one another.
    """
    if unread := [key for key in OF_THE_REWARD if getattr(finetuning_args, key, None)]:
        _warn(f"{', '.join(unread)}: no effect, since this stage has no reward model; remove it")
    name, adapters = finetuning_args.ref_model, finetuning_args.ref_model_adapters
    if not _is_used(finetuning_args):
        if name or adapters:
            _warn("ref_model: no effect, since this stage and loss compare with no reference model; remove it")
        return
    if name is None:
        if adapters:
            raise ConfigError(
                f"ref_model_adapters: {adapters} needs ref_model, the model that it belongs to; without it the "
                "reference is the policy without its adapter; set ref_model or remove ref_model_adapters"
            )
        if model_args.adapter_name_or_path and not finetuning_args.create_new_adapter:
            _warn(
                "no ref_model: the reference is the base model without the adapter that this run goes on with; to "
                "start from that adapter, set create_new_adapter: true, or ref_model and ref_model_adapters"
            )
        return
    _check_keys(name, adapters, model_args, finetuning_args)
    try:
        reference_args = type(model_args).copyfrom(
            model_args, model_name_or_path=name, adapter_name_or_path=adapters, quantization_bit=None
        )
        reference = check_inputs(reference_args)
    except KTError as error:
        raise ConfigError(f"ref_model {name}: {error}") from error
    if policy is not None and reference is not None:
        needed = [_memory(policy, model_args), _memory(reference, reference_args)]
        check_memory_of_all(needed, "the policy and its ref_model")


def is_same_model(one: str, other: str) -> bool:
    """Whether two values of `model_name_or_path` name the same model."""
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return one == other


def _keep_own(copy: Any, policy: Any, use_model_directory: Callable[[Any], None]) -> None:
    """Take from a copy of the policy's arguments what belongs to the policy alone."""
    for key in FILES_OF_THE_POLICY:
        setattr(copy, key, None)
    use_model_directory(copy)
    if is_same_model(copy.model_name_or_path, policy.model_name_or_path):
        for key in FILES_OF_THE_POLICY:  # they say where the experts of this very model are
            setattr(copy, key, getattr(policy, key))
        return
    copy.model_revision = _DEFAULT_REVISION  # a revision is one of a repository
    if copy.kt_optimize_rule is not None and _model_type(copy) != _model_type(policy):
        _warn(f"ref_model: kt_optimize_rule is for the policy's {_model_type(policy)} model and places no module of it")
        copy.kt_optimize_rule = copy.kt_rule_vars = None
    folder, adapter = copy.adapter_folder, (copy.adapter_name_or_path or [""])[0]
    if folder and os.path.isdir(adapter) and not os.path.isdir(os.path.join(adapter, folder)):
        copy.adapter_folder = None


def _is_used(finetuning_args: Any) -> bool:
    return finetuning_args.stage == "kto" or bool(getattr(finetuning_args, "use_ref_model", False))


def _check_keys(name: str, adapters: str | None, model_args: Any, finetuning_args: Any) -> None:
    has_gguf = is_gguf_model(name) or is_same_model(name, model_args.model_name_or_path)
    faults = []
    if finetuning_args.ref_model_quantization_bit:
        faults.append("ref_model_quantization_bit: experts have a format of their own (kt_method); remove it")
    if adapters and "," in adapters:
        faults.append("ref_model_adapters: expected one with use_kt, found several; merge them with kt-sft merge")
    if os.path.isdir(name) and is_container(name):
        faults.append(f"ref_model {name}: expected a model, found a container of packed experts; name its checkpoint")
    elif args.kt_config(model_args).method == "GGUF" and not has_gguf:
        faults.append(
            f"ref_model {name}: expected a GGUF file, since kt_method GGUF keeps the types of one; name the "
            "reference's own GGUF file, or set kt_method BF16, INT8 or INT4"
        )
    if faults:
        raise ConfigError(faults)


def _model_type(model_args: Any) -> str | None:
    hub = {"revision": model_args.model_revision, "cache_dir": model_args.cache_dir, "token": model_args.hf_hub_token}
    return read_config_file(find_config_file(model_args.model_name_or_path, hub)).get("model_type")


def _memory(model: nn.Module, model_args: Any) -> MemoryEstimate:
    experts = {name: module for name, module in iter_routed_experts(model)}
    formats: dict[str, WeightFormats] = {
        name: module.formats if module.weight_format == "gguf" else module.weight_format
        for name, module in experts.items()
    }
    specs = {name: module.spec for name, module in experts.items()}
    device = importlib.import_module("llamafactory.extras.misc").get_current_device()
    rest = bytes_outside_experts(model, specs) if device.type == "cpu" else 0
    return memory_needed(specs, rest, args.kt_config(model_args), formats)


def _warn(message: str) -> None:
    if env.local_rank() == 0:
        logger.warning("kt_sft: %s", message)
