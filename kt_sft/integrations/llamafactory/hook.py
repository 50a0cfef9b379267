"""The patch points in LLaMA-Factory: one function per patched module, each replacing global names of that module.

`use_kt` is set back to False right after parsing and `kt_active` takes its place, so LLaMA-Factory's own KT branches,
which ask for other packages and refuse half of the features, never run. Every replacement leaves a model without
`kt_config` to the stock code.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from kt_sft import env
from kt_sft.adapters.folder import local_adapter
from kt_sft.compat.transformers import use_one_gpu
from kt_sft.errors import ConfigError
from kt_sft.integrations.llamafactory import (
    adapters,
    args,
    autoload,
    checked,
    closing,
    data_checks,
    disk,
    exporting,
    native_classes,
    parsing,
    peer_keys,
    references,
    reporting,
    resuming,
    trainer,
)
from kt_sft.integrations.peft import limits
from kt_sft.integrations.peft.adapter_dir import check_adapter
from kt_sft.integrations.peft.injecting import has_experts
from kt_sft.integrations.peft.reloading import bare_twin
from kt_sft.integrations.transformers.model_files import drop_quantization
from kt_sft.integrations.transformers.opened import OpenedModel
from kt_sft.integrations.transformers.quantizer import KTExpertsConfig
from kt_sft.placement import inject

logger = logging.getLogger(__name__)


def patch_parser(parser: ModuleType) -> None:
    """`ModelArguments`: our keys. `_parse_args`: every command parses through it: checks, switch of flags.
    `get_last_checkpoint`: the newest whole one.
    """
    lists = ("_TRAIN_ARGS", "_INFER_ARGS", "_EVAL_ARGS", "_TRAIN_MCA_ARGS")
    autoload.require(parser, "ModelArguments", "_parse_args", "read_args", "get_last_checkpoint", *lists)
    stock_class, stock_parse = parser.ModelArguments, parser._parse_args
    stock_last = parser.get_last_checkpoint
    parsed: dict[str, Any] = {}
    our_class = args.model_arguments(stock_class)
    references.patch_copies(our_class)
    for name in (parser.__name__, stock_class.__module__, parser.__package__):
        if vars(sys.modules[name]).get("ModelArguments") is stock_class:
            sys.modules[name].ModelArguments = our_class
    for classes in (getattr(parser, name) for name in lists):
        classes[:] = [our_class if kind is stock_class else kind for kind in classes]

    def parse_args(hf_parser: Any, values: Any = None, allow_extra_keys: bool = False) -> tuple[Any, ...]:
        values, notes = peer_keys.translate(parser.read_args(values))
        if not allow_extra_keys:
            args.check_known(values, hf_parser.dataclass_types, hf_parser._option_string_actions)
        with parsing.errors_in_one_line(values):
            values = parsing.check_unparsed(values, hf_parser.dataclass_types)
            if args.is_set(values, "use_kt"):
                hf_parser.error = parsing.raise_fault
            groups = stock_parse(hf_parser, values, allow_extra_keys=allow_extra_keys)
        if any(hasattr(group, "use_kt") for group in groups):
            for note in notes:
                _warn(note)
            activate(groups, values)
            parsed["model_args"] = next(group for group in groups if hasattr(group, "use_kt"))
        return groups

    def get_last_checkpoint(folder: str) -> str | None:
        if not is_active(parsed.get("model_args")):
            return stock_last(folder)
        found = resuming.last_checkpoint(folder, says=False)  # `activate` has said it
        return None if found is None else str(found)

    parser._parse_args, parser.get_last_checkpoint = parse_args, get_last_checkpoint
    parsing.patch_parser(parser)
    reporting.report_errors_in_one_line()
    reporting.show_lines()


def patch_loader(loader: ModuleType) -> None:
    """`patch_config`: how to load. `init_adapter`: merge or not. `count_parameters`: experts count too. `load_model`:
    an export loads nothing. `load_config`, `load_tokenizer`: transformers' own classes.
    """
    autoload.require(loader, "patch_config", "init_adapter", "count_parameters", "load_model")
    native_classes.patch_loader(loader, is_active)
    stock_config, stock_init, stock_count = loader.patch_config, loader.init_adapter, loader.count_parameters
    stock_load = loader.load_model

    def patch_config(
        config: Any, tokenizer: Any, model_args: Any, init_kwargs: dict[str, Any], is_trainable: bool
    ) -> None:
        if is_active(model_args):
            drop_quantization(config)  # before the stock code sets up a quantizer for it
        stock_config(config, tokenizer, model_args, init_kwargs, is_trainable)
        if is_active(model_args):
            load_experts_apart(model_args, init_kwargs)

    def init_adapter(
        config: Any, model: nn.Module, model_args: Any, finetuning_args: Any, is_trainable: bool
    ) -> nn.Module:
        with adapters.merging(model_args, finetuning_args, is_trainable), adapters.under_keys():
            return stock_init(config, model, model_args, finetuning_args, is_trainable)

    def count_parameters(model: nn.Module) -> tuple[int, int]:
        return adapters.count_parameters(model, stock_count)

    def load_model(
        tokenizer: Any, model_args: Any, finetuning_args: Any, is_trainable: bool = False, add_valuehead: bool = False
    ) -> nn.Module:
        is_export = is_active(model_args) and adapters.is_export(model_args, is_trainable)
        if is_export and exporting.merges_files(model_args):
            return exporting.merging_model(exporting.open_merged(model_args, **checked.hub(model_args)))
        model = stock_load(tokenizer, model_args, finetuning_args, is_trainable, add_valuehead)
        if is_active(model_args) and not is_trainable:
            closing.guard(model)
        return model

    loader.patch_config, loader.init_adapter, loader.count_parameters = patch_config, init_adapter, count_parameters
    loader.load_model = load_model


def patch_adapter(adapter: ModuleType) -> None:
    """`find_all_linear_modules`: `all` without the router. `patch_target_modules`: no name of the target vanishes."""
    autoload.require(adapter, "find_all_linear_modules", "patch_target_modules", "get_forbidden_modules")
    stock_find, stock_patch = adapter.find_all_linear_modules, adapter.patch_target_modules

    def find_all_linear_modules(model: nn.Module, freeze_vision_tower: bool) -> list[str]:
        found = stock_find(model, freeze_vision_tower)
        return adapters.all_linear(model, found) if has_experts(model) else found

    def patch_target_modules(model: nn.Module, finetuning_args: Any, target_modules: list[str]) -> list[str]:
        if not has_experts(model):
            return stock_patch(model, finetuning_args, target_modules)
        return adapters.lora_target(adapter, model, finetuning_args, list(target_modules), stock_patch)

    adapter.find_all_linear_modules, adapter.patch_target_modules = find_all_linear_modules, patch_target_modules


def is_active(model_args: Any) -> bool:
    """Whether this run uses the expert kernels."""
    return bool(getattr(model_args, "kt_active", False))


def activate(groups: tuple[Any, ...], values: dict[str, Any] | list[str]) -> None:
    """Check a parsed configuration and hand its `use_kt` over to `kt_active`.

    Args:
        groups: LLaMA-Factory's parsed argument objects; changed in place.
        values: what they were parsed from.

    Raises:
        ConfigError: the configuration cannot work with use_kt, or a patch point is missing.
    """
    model_args = next(group for group in groups if hasattr(group, "use_kt"))
    if not model_args.use_kt:
        unread = [key for key in args.KEYS if args.given(values, key) is not None]
        without = f", {', '.join(unread)} without effect" if unread else ""
        says = "says `use_kt: false`" if args.given(values, "use_kt") is not None else "has no `use_kt: true`"
        _warn(f"USE_KT=1, but the configuration {says}: stock LLaMA-Factory runs{without}; set it, or unset USE_KT")
        return
    _require_all_patches()
    settings = args.check(*groups)
    if unused := args.no_effect(model_args):
        _warn(f"without effect in kt_sft: {', '.join(unused)}; remove {'it' if len(unused) == 1 else 'them'}")
    if model_args.export_dir:
        disk.check_writable(model_args.export_dir, "export_dir")
    finetuning_args = next(group for group in groups if hasattr(group, "lora_target"))
    model_args.kt_expert_lora = args.expert_lora(settings, finetuning_args.lora_target)
    models = checked.of(model_args)
    models.use_directory(model_args)
    opened = check_inputs(model_args)
    if model_args.infer_backend == "ktransformers":  # an inference engine of 0.9.4; ours is a Hugging Face model
        model_args.infer_backend = "huggingface"
    training_args = next((group for group in groups if hasattr(group, "per_device_train_batch_size")), None)
    if opened is not None and (model_args.export_dir or finetuning_args.create_new_adapter):
        for source in _adapters(model_args):
            limits.check_merge(opened.model, source)
    if training_args is not None:
        use_one_device(training_args, has_rules=model_args.kt_optimize_rule is not None)
    model_args.use_kt, model_args.kt_active = False, True
    if training_args is not None:
        references.check(model_args, finetuning_args, opened, check_inputs)
        check_run(opened, model_args, training_args, finetuning_args)
    models.forget_models()
    for data_args in (group for group in groups if hasattr(group, "dataset_dir")):
        data_args.kt_active = True
        data_checks.check(data_args)


def check_inputs(model_args: Any) -> OpenedModel | None:
    """Look at the model's and the adapter's files now: LLaMA-Factory first tokenises the data set.

    Returns:
        What was opened, with the model without weights for further checks; None where nothing is loaded, or only
        LLaMA-Factory can.

    Raises:
        KTError: what `load_model` and `load_adapter` would raise.
    """
    misc = importlib.import_module("llamafactory.extras.misc")
    path = model_args.model_name_or_path
    if exporting.merges_files(model_args):
        exporting.open_merged(model_args, **checked.hub(model_args))
        return None
    if not os.path.isdir(path) and (misc.use_modelscope() or misc.use_openmind()):
        return None  # only LLaMA-Factory can ask those hubs
    opened = checked.of(model_args).check(model_args)
    for source in _adapters(model_args):
        check_adapter(opened.model, source, may_grow=exporting.may_grow(model_args))
    return opened


def _adapters(model_args: Any) -> Iterator[Path]:
    """Where the adapters of a run lie."""
    for adapter in model_args.adapter_name_or_path or []:
        yield local_adapter(adapter, subfolder=model_args.adapter_folder, **checked.hub(model_args))


def check_run(opened: OpenedModel | None, model_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """Whether a run can write its results, can make its adapter, and goes on from a checkpoint that fits it.

    Args:
        opened: of `check_inputs`; its model is not to be used afterwards.

    Raises:
        KTError: see `disk` and `resuming`.
    """
    disk.check_writable(training_args.output_dir)
    if faults := list(parsing.reporting_faults(training_args.report_to)):
        raise ConfigError(faults)
    if not training_args.do_train:
        return
    trainer.install()
    checkpoint = resuming.find_checkpoint(training_args)
    if opened is None:
        return
    model = opened.model
    model.kt_config = opened.settings
    bare = None if checkpoint is None else bare_twin(model)
    run = resuming.run_adapter(model, model_args, finetuning_args)
    if checkpoint is not None:
        known = None if exporting.may_grow(model_args) else run
        resuming.check(checkpoint, bare, known, training_args, finetuning_args)
    if run is not None and training_args.should_save:
        disk.check_room(training_args.output_dir, run.numel, training_args, finetuning_args)


def use_one_device(training_args: Any, *, has_rules: bool = False) -> None:
    """One process drives one GPU: without torchrun the trainer would copy the model by nn.DataParallel.

    Args:
        has_rules: a rule file says which GPUs the process uses, one after the other; the copies are wrong then, too.
    """
    if training_args.n_gpu > 1:
        if not has_rules:
            seen = f"{training_args.n_gpu} GPUs are visible, this process uses one"
            _warn(f"{seen}; FORCE_TORCHRUN=1 starts a process for each, kt_optimize_rule spreads the layers over them")
        use_one_gpu(training_args)


def load_experts_apart(model_args: Any, init_kwargs: dict[str, Any]) -> None:
    """Have from_pretrained build our experts modules, and put everything else on one device, or where rules say.

    `device_map: auto` would take the experts' placeholders for weights and send layers to the disk.
    """
    device_map = init_kwargs.pop("device_map", None)
    init_kwargs.pop("offload_folder", None)
    current = importlib.import_module("llamafactory.extras.misc").get_current_device
    device = torch.device(device_map[""] if isinstance(device_map, dict) else current())
    opened = checked.of(model_args).take(model_args, device)
    init_kwargs["quantization_config"] = KTExpertsConfig(opened)
    if opened.plan is not None:
        if opened.plan.devices != ("cpu",):
            init_kwargs["device_map"] = inject.device_map(opened.plan)
    elif device_map is not None and device.type != "cpu":
        init_kwargs["device_map"] = {"": device}


def _require_all_patches() -> None:
    """Without this, a patch point that was not found would mean stock code on packed experts, unnoticed."""
    for name in autoload.PATCHES:
        if name not in autoload.OPTIONAL:
            importlib.import_module(name)
    if failures := autoload.failures():
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise ConfigError(
            f"use_kt: LLaMA-Factory could not be patched ({reasons}); pip install llamafactory=={autoload.SUPPORTED}"
        )


def _warn(message: str) -> None:
    if env.local_rank() == 0:
        logger.warning("kt_sft: %s", message)
