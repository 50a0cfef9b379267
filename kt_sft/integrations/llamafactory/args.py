"""Our configuration keys in LLaMA-Factory: their fields, the checks on a configuration, the KTConfig they make."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kt_sft.config import KTConfig
from kt_sft.errors import ConfigError, FormatError, near, under_name, unknown_names
from kt_sft.formats.json_object import read_object
from kt_sft.integrations.llamafactory import lora_options

# Key -> (type, help). Keys that LLaMA-Factory already has keep their own field. Default None: "as KTConfig has it".
KEYS: dict[str, tuple[type, str]] = {
    "kt_method": (
        str,
        "Weight format of the routed experts in memory: BF16, INT8, INT4, RAWINT4, GGUF (also AMXBF16, ...).",
    ),
    "kt_int4_group_size": (int, "Weights that share a scale with kt_method INT4: 32 (default), 64 or 128."),
    "kt_expert_activations": (str, "Activations of the experts: auto (default), bf16, bfp16 or int8."),
    "kt_cpu_linear": (str, "Kernels for frozen linear layers on the CPU: auto (default), off, bf16 or int8."),
    "kt_weight_path": (str, "Checkpoint, GGUF file or packed container of the experts; default: model_name_or_path."),
    "kt_weight_load": (str, "Use of a packed container: auto (default), mmap or copy."),
    "kt_weight_cache": (str, "Directory where a packed container of the experts is kept for later loads."),
    "kt_expert_checkpoint_path": (str, "Another name of kt_weight_path."),
    "kt_optimize_rule": (str, "Rule file: devices of modules, formats of experts by layer (docs/rules.md)."),
    "kt_rule_vars": (str, "Values for variables of the rule file: a mapping, or name=value,name=value."),
    "cpu_infer": (int, "CPU threads of the expert kernels; default: the physical cores it may use."),
    "kt_threadpool_count": (int, "Groups of threads; default: one per NUMA node."),
    "chunk_size": (int, "Tokens per pass of the expert kernels; default 1024."),
    "kt_max_deferred_experts_per_token": (
        int,
        "Inference only, approximate: experts of a token that are added one layer later; default 0.",
    ),
    "kt_expert_lora": (bool, "LoRA on the routed experts; default: if lora_target is `all` or names experts."),
    "kt_cpu_activation": (str, "Expert activations until backward: retain (default) or recompute."),
    "kt_maxlen": (int, "No effect: cutoff_len and max_new_tokens bound the length."),
    "mode": (str, "No effect."),
    "kt_mode": (str, "No effect."),
    "kt_use_cuda_graph": (bool, "No effect."),
    "kt_force_think": (bool, "No effect: use enable_thinking."),
}
NO_EFFECT = ("kt_maxlen", "mode", "kt_mode", "kt_use_cuda_graph", "kt_force_think")
KEY_OF_SETTING = {  # KTConfig field -> key
    "method": "kt_method",
    "int4_group_size": "kt_int4_group_size",
    "expert_activations": "kt_expert_activations",
    "cpu_linear": "kt_cpu_linear",
    "threads": "cpu_infer",
    "threadpool_count": "kt_threadpool_count",
    "chunk_size": "chunk_size",
    "max_deferred_experts_per_token": "kt_max_deferred_experts_per_token",
    "expert_lora": "kt_expert_lora",
    "cpu_activation": "kt_cpu_activation",
    "weight_path": "kt_weight_path",
    "weight_load": "kt_weight_load",
    "weight_cache": "kt_weight_cache",
    "optimize_rule": "kt_optimize_rule",
    "rule_vars": "kt_rule_vars",
}
YES, NO = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")  # of a flag, as transformers reads words
STAGES = ("pt", "sft", "dpo", "kto")

_LEAST = math.ulp(0.0)  # of what has to be above 0
_MOST = (1 << 31) - 1
# Key -> (least, most, words): what LLaMA-Factory or torch would refuse, or compute nonsense with, after loading.
RANGES: dict[str, tuple[float, float, str]] = {
    "per_device_train_batch_size": (1, _MOST, f"a whole number from 1 to {_MOST}"),
    "per_device_eval_batch_size": (1, _MOST, f"a whole number from 1 to {_MOST}"),
    "gradient_accumulation_steps": (1, _MOST, f"a whole number from 1 to {_MOST}"),
    "cutoff_len": (1, _MOST, f"a whole number from 1 to {_MOST}"),
    "max_samples": (1, _MOST, f"a whole number from 1 to {_MOST}"),
    "preprocessing_num_workers": (1, _MOST, f"a whole number from 1 to {_MOST}"),
    "val_size": (0, sys.float_info.max, "a number >= 0"),
    "lora_alpha": (1, _MOST, f"a whole number from 1 to {_MOST}"),
    "lora_dropout": (0, math.nextafter(1, 0), "0 <= p < 1"),
    "learning_rate": (_LEAST, sys.float_info.max, "a number > 0"),
    "weight_decay": (0, sys.float_info.max, "a number >= 0"),
    "adam_beta1": (0, math.nextafter(1, 0), "0 <= beta < 1"),
    "adam_beta2": (0, math.nextafter(1, 0), "0 <= beta < 1"),
    "adam_epsilon": (0, sys.float_info.max, "a number >= 0"),
    "pref_beta": (_LEAST, sys.float_info.max, "a number > 0"),
    "temperature": (0, sys.float_info.max, "a number >= 0"),
    "top_p": (0, 1, "0 <= p <= 1"),
    "top_k": (0, _MOST, f"a whole number from 0 to {_MOST}"),
    "repetition_penalty": (_LEAST, sys.float_info.max, "a number > 0"),
}

# Keys of LLaMA-Factory that cannot go with use_kt: key -> what is wrong; any value but None and False is refused.
REFUSED = {
    "quantization_bit": "the experts have their own format (kt_method); remove quantization_bit",
    "export_quantization_bit": "the export is bf16; remove export_quantization_bit and quantize the exported model",
    "use_llama_pro": "block expansion does not reach the routed experts; remove use_llama_pro",
    "use_unsloth": "unsloth replaces the model code; remove use_unsloth",
    "enable_liger_kernel": "liger replaces the experts module; remove enable_liger_kernel",
    "mixture_of_depths": "mixture-of-depths replaces the layers; remove mixture_of_depths",
    "train_from_scratch": "the experts are read from a checkpoint; remove train_from_scratch",
    "use_mca": "Megatron training loads the model by itself; unset USE_MCA",
    "use_hyper_parallel": "HyperParallel loads the model by itself; remove use_hyper_parallel",
    "fsdp": "FSDP shards parameters, and routed experts are none; remove fsdp, use DDP or DeepSpeed ZeRO-2",
    "kt_use_lora_experts": "extra LoRA experts on the GPU are not supported; remove kt_use_lora_experts",
}


def model_arguments(base: type) -> type:
    """LLaMA-Factory's ModelArguments with the keys it lacks, and `kt_active`, which follows `use_kt` after parsing."""
    present = {field.name for field in dataclasses.fields(base)}
    added: list[tuple[str, Any, Any]] = [
        (key, kind | None, dataclasses.field(default=None, metadata={"help": f"{text} (kt_sft)"}))
        for key, (kind, text) in KEYS.items()
        if key not in present
    ]
    added.append(("kt_active", bool, dataclasses.field(default=False, init=False)))
    # The same name in the same module as the stock class, so that it pickles.
    namespace = {"__module__": base.__module__, "__doc__": base.__doc__}
    return dataclasses.make_dataclass(base.__name__, added, bases=(base,), namespace=namespace)


def kt_config(model_args: Any) -> KTConfig:
    """The expert settings of parsed model arguments.

    Raises:
        ConfigError: lists every wrong value under the name of its key.
    """
    values = {field: getattr(model_args, key, None) for field, key in KEY_OF_SETTING.items()}
    values["weight_path"] = values["weight_path"] or getattr(model_args, "kt_expert_checkpoint_path", None)
    if values["cpu_linear"] is False:
        values["cpu_linear"] = "off"  # as YAML reads this word without quotes
    try:
        config = KTConfig(**{field: value for field, value in values.items() if value is not None})
    except ConfigError as error:
        raise ConfigError([_under_key(fault) for fault in error.faults]) from None
    if not getattr(model_args, "export_dir", None):
        return config
    # An export computes nothing: packing linear layers would only take time, or round them, and rules place nothing.
    return dataclasses.replace(config, cpu_linear="off", optimize_rule=None, rule_vars=None)


def check_known(
    args: dict[str, Any] | list[str], dataclass_types: Iterable[type], option_strings: Iterable[str]
) -> None:
    """Refuse keys that no dataclass has, with the nearest known one.

    Args:
        args: what LLaMA-Factory read: a mapping from a file, or command line words.
        option_strings: options of the argument parser; as there, an unambiguous beginning of one is enough.

    Raises:
        ConfigError: lists every unknown key.
    """
    known = [field.name for kind in dataclass_types for field in dataclasses.fields(kind) if field.init]
    if isinstance(args, dict):
        unknown = [key for key in args if key not in known]
    else:
        words = [word.split("=", 1)[0] for word in args if word.startswith("--")]
        options = list(option_strings)
        unknown = [word[2:] for word in words if not any(option.startswith(word) for option in options)]
    if unknown:
        raise ConfigError(unknown_names(unknown, lambda key: nearest_key(str(key), known)))


def nearest_key(key: str, known: list[str]) -> str:
    """The hint of `errors.nearest`, without its list of all names: there are over three hundred."""
    close = near(key, known)
    return f"did you mean {close!r}?" if close else "remove it, or see configs/README.md for the keys"


def no_effect(model_args: Any) -> list[str]:
    """Keys that are set and accepted but do nothing."""
    keys = (*NO_EFFECT, "kt_optimize_rule") if getattr(model_args, "export_dir", None) else NO_EFFECT
    return [key for key in keys if getattr(model_args, key, None) is not None]


def check(*groups: Any) -> KTConfig:
    """Refuse a configuration with `use_kt: true` that cannot work, before any model or data is read.

    Args:
        groups: the parsed argument objects of LLaMA-Factory, any of them.

    Returns:
        The settings of the experts.

    Raises:
        ConfigError: lists every fault.
    """
    faults = list(_faults(groups))
    model_args = next(group for group in groups if hasattr(group, "use_kt"))
    try:
        config = kt_config(model_args)
    except ConfigError as error:
        raise ConfigError([*faults, *error.faults]) from None
    if faults:
        raise ConfigError(faults)
    return config


def given(values: dict[str, Any] | list[str], key: str) -> Any:
    """What a mapping or command line words have for a key: of words the text behind `--key`, True of a flag alone."""
    if isinstance(values, dict):
        return values.get(key)
    found = None
    for word, following in itertools.pairwise([*values, "--"]):
        name, sign, value = word.partition("=")
        if name.replace("-", "_") == f"__{key}":  # --use-kt is --use_kt
            found = value if sign else following.startswith("--") or following
    return found


def is_set(values: dict[str, Any] | list[str], key: str) -> bool:
    """Whether a flag of a run that is not parsed yet is on."""
    return str(given(values, key)).lower() in YES


def deepspeed_faults(deepspeed: Any) -> Iterator[str]:
    """What is wrong with a `deepspeed` value: ZeRO stage 3, or no configuration."""
    if is_zero3(deepspeed):
        yield ZERO3_FAULT
    elif isinstance(deepspeed, str):
        try:
            read_object(deepspeed, "configuration of DeepSpeed", remedy="correct the path")
        except FormatError as error:
            found = f"{deepspeed}: expected a configuration of DeepSpeed, found {error.found}"
            yield f"deepspeed: {found}; correct the path"


def precision_faults(values: dict[str, Any] | list[str], *, has_bf16: bool, has_gpu: bool) -> Iterator[str]:
    """What this machine cannot train in, of a run that is not parsed yet.

    Args:
        has_bf16: there is an accelerator that computes in bf16.
        has_gpu: there is an accelerator.
    """
    on_cpu = is_set(values, "use_cpu")
    cpu = "a CPU trains with bf16: true and use_cpu: true"
    for key in ("bf16", "bf16_full_eval"):
        if is_set(values, key) and not on_cpu and not has_bf16:
            yield f"{key}: expected a GPU that computes in bf16, found none; add use_cpu: true to train on the CPU"
    if is_set(values, "pure_bf16") and not has_bf16:
        yield f"pure_bf16: expected a GPU that computes in bf16, found none; {cpu}"
    if is_set(values, "fp16") and (on_cpu or not has_gpu):
        yield f"fp16: expected a GPU, found {'use_cpu: true' if on_cpu else 'none'}; {cpu}"


def is_zero3(deepspeed: Any) -> bool:
    """Whether a `deepspeed` value (path of a JSON file, or its content) asks for ZeRO stage 3."""
    if isinstance(deepspeed, str):
        try:
            deepspeed = read_object(deepspeed, "configuration of DeepSpeed")
        except FormatError:
            return False
    zero = deepspeed.get("zero_optimization") if isinstance(deepspeed, dict) else None
    return isinstance(zero, dict) and zero.get("stage") == 3


ZERO3_FAULT = "deepspeed: ZeRO-3 shards parameters, and routed experts are none; use a ZeRO-2 configuration"


def expert_lora(config: KTConfig, lora_target: list[str]) -> bool | None:
    """LoRA on the routed experts: as set, else yes for `all`; None leaves it to the names in the target.

    It has to be decided here: LLaMA-Factory replaces `all` by the names of the linear layers, which experts are not.
    """
    return True if config.expert_lora is None and "all" in lora_target else config.expert_lora


def adapter_paths(values: Mapping[str, Any]) -> list[str]:
    """The value of `adapter_name_or_path`: a list, or names with commas.

    Raises:
        ConfigError: it is neither.
    """
    value = values.get("adapter_name_or_path") or []
    if not isinstance(value, str | list) or not all(isinstance(path, str) for path in value):
        raise ConfigError(f"adapter_name_or_path: expected the name of a directory, found {value!r}")
    return [path.strip() for path in value.split(",")] if isinstance(value, str) else list(value)


def _faults(groups: tuple[Any, ...]) -> Iterator[str]:
    for key in ("use_kt", "trust_remote_code"):  # a text would be taken for true, whatever it says
        if not isinstance(value := _value(groups, key), bool | None):
            yield f"{key}: expected true or false, found {value!r}"
    for key, sentence in REFUSED.items():
        value = _value(groups, key)
        if value not in (None, False, "", []):
            yield f"{key}: {sentence}"
    if (kind := _value(groups, "finetuning_type")) != "lora":
        yield f"finetuning_type: expected lora with use_kt, found {kind!r}; set finetuning_type: lora"
    if (stage := _value(groups, "stage")) not in STAGES:
        yield f"stage: expected one of {', '.join(STAGES)} with use_kt, found {stage!r}; a value head is not supported"
    if (backend := _value(groups, "infer_backend")) not in ("huggingface", "ktransformers"):
        yield f"infer_backend: expected huggingface with use_kt, found {str(backend)!r}; export for other engines"
    rank, on_experts = _value(groups, "lora_rank"), _value(groups, "kt_expert_lora")
    if on_experts is None:
        on_experts = "all" in (_value(groups, "lora_target") or [])
    yield from range_faults({key: _value(groups, key) for key in RANGES})
    if type(rank) is not int or rank < 1:
        yield f"lora_rank: expected a whole number >= 1, found {rank!r}"
    use_dora, pissa_init = _value(groups, "use_dora"), _value(groups, "pissa_init")
    yield from lora_options.faults(rank=rank, use_dora=use_dora, pissa_init=pissa_init, on_experts=bool(on_experts))
    if _value(groups, "kt_max_deferred_experts_per_token") and _value(groups, "do_train"):
        yield "kt_max_deferred_experts_per_token: deferred experts are for inference; remove it, or set do_train: false"
    first, second = _value(groups, "kt_weight_path"), _value(groups, "kt_expert_checkpoint_path")
    if first and second and first != second:
        yield "kt_expert_checkpoint_path: differs from kt_weight_path, which means the same; remove one of them"
    if len(_value(groups, "adapter_name_or_path") or []) > 1 and not _value(groups, "export_dir"):
        yield "adapter_name_or_path: expected one with use_kt, found several; merge them with llamafactory-cli export"


def range_faults(values: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that are out of range."""
    for key, (least, most, words) in RANGES.items():
        value = values.get(key)
        if type(value) in (int, float) and not least <= value <= most:
            yield f"{key}: expected {words}, found {value}"


def _value(groups: tuple[Any, ...], key: str) -> Any:
    return next((getattr(group, key) for group in groups if hasattr(group, key)), None)


def _under_key(fault: str) -> str:
    key, colon, rest = under_name(fault, KEY_OF_SETTING).partition(":")
    for setting in ("optimize_rule", "rule_vars", "weight_path", "weight_cache"):  # none is a word of the sentence
        rest = re.sub(rf"\b{setting}\b", KEY_OF_SETTING[setting], rest)
    return f"{key}{colon}{rest}"
