"""The one seam in PEFT: whoever puts an adapter on a model with our experts, it is prepared, bound and checked here.

`peft.get_peft_model`, `PeftModel(...)`, TRL's trainers, `inject_adapter_in_model` and transformers' `add_adapter` all
end in `BaseTuner.inject_adapter`. `install` puts a step around it, and around the methods of PeftModel that know
nothing of experts, or write files one over the other. A model without our experts passes straight through.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils import PeftType
from torch import nn

from kt_sft.adapters import options
from kt_sft.adapters.patterns import Patterns, check_speed
from kt_sft.adapters.schema import find_faults
from kt_sft.compat.peft import BaseTuner, BaseTunerLayer, LoraLayer, ParamWrapper
from kt_sft.errors import ConfigError
from kt_sft.formats.file_names import ADAPTER_CONFIG
from kt_sft.formats.overwriting import MODEL_CARD, saved_into
from kt_sft.integrations.peft import coverage
from kt_sft.integrations.peft.binding import (
    bind_expert_lora,
    bind_experts,
    chain_of,
    expose_placeholders,
    restore_linear_dropout,
)
from kt_sft.integrations.peft.limits import lost_biases, training_limits
from kt_sft.integrations.peft.targets import (
    ExpertLoraConfig,
    expert_names,
    expert_targets,
    plain_values,
    prepare_lora_config,
)
from kt_sft.models.spec import iter_routed_experts

logger = logging.getLogger(__name__)

_FEW = 256  # Python's re keeps 512 compiled expressions, and PEFT compiles each key anew for each module


@dataclass(frozen=True)
class _Request:
    """What our own calls know beside the config: their `expert_lora`, and whether the config is a saved one's."""

    expert_lora: bool | None = None
    is_saved: bool = False


_request: contextvars.ContextVar[_Request | None] = contextvars.ContextVar("request", default=None)


@contextmanager
def requesting(*, expert_lora: bool | None = None, is_saved: bool = False) -> Iterator[None]:
    """Within it, a new adapter follows these.

    Args:
        expert_lora: see `prepare_lora_config`.
        is_saved: the config was saved with its adapter: it is taken word by word.
    """
    token = _request.set(_Request(expert_lora, is_saved))
    try:
        yield
    finally:
        _request.reset(token)


def install(load_adapter: Callable[..., PeftModel], reload_adapter: Callable[..., Any]) -> None:
    """Put the step into PEFT, once per process.

    Args:
        load_adapter: what `PeftModel.from_pretrained` does on a model with our experts.
        reload_adapter: what a PeftModel's `load_adapter` does, if it has our experts.
    Raises:
        RuntimeError: this PEFT lacks one of the names, or a parameter that the step reads.
    """
    if hasattr(BaseTuner.inject_adapter, "of_kt_sft"):
        return
    for owner, name, parameter in (
        (BaseTuner, "inject_adapter", "adapter_name"),
        (PeftModel, "__init__", "model"),
        (PeftModel, "from_pretrained", "model_id"),
        (PeftModel, "save_pretrained", "is_main_process"),
    ):
        method = getattr(owner, name, None)
        if method is None or parameter not in inspect.signature(method).parameters:
            raise RuntimeError(f"no {owner.__name__}.{name}(..., {parameter}) in this PEFT; pip install 'peft<0.19'")
    stock_inject, stock_init = BaseTuner.inject_adapter, PeftModel.__init__
    stock_from_pretrained = PeftModel.from_pretrained.__func__

    @functools.wraps(stock_inject)
    def inject_adapter(self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        stock = functools.partial(stock_inject, self, model, adapter_name, *args, **kwargs)
        return _inject(stock, self, model, adapter_name) if has_experts(model) else stock()

    @functools.wraps(stock_init)
    def init(self: PeftModel, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        stock_init(self, model, *args, **kwargs)
        if has_experts(model):
            bind_expert_lora(self, reload_adapter)

    @functools.wraps(stock_from_pretrained)
    def from_pretrained(cls, model, model_id, adapter_name="default", is_trainable=False, config=None, **kwargs):
        if not has_experts(model):
            return stock_from_pretrained(cls, model, model_id, adapter_name, is_trainable, config, **kwargs)
        return load_adapter(model, model_id, is_trainable, adapter_name=adapter_name, config=config, **kwargs)

    stock_save = PeftModel.save_pretrained

    @functools.wraps(stock_save)
    def save_pretrained(self: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
        stock = functools.partial(stock_save, self)
        given = inspect.signature(stock).bind(save_directory, *args, **kwargs)
        given.apply_defaults()
        if not has_experts(self) or not given.arguments["is_main_process"]:
            return stock(*given.args, **given.kwargs)
        with saved_into(save_directory, kept=(MODEL_CARD,), needed_bytes=_adapter_bytes(self)) as staging:
            given.arguments["save_directory"] = str(staging)
            stock(*given.args, **given.kwargs)
        return None

    inject_adapter.of_kt_sft = True
    BaseTuner.inject_adapter, PeftModel.__init__ = inject_adapter, init
    PeftModel.save_pretrained = save_pretrained
    PeftModel.from_pretrained = classmethod(from_pretrained)


def has_experts(model: nn.Module) -> bool:
    """Whether routed experts of ours are in a model, wrapped or not."""
    return next(iter_routed_experts(model), None) is not None


def _adapter_bytes(model: nn.Module) -> int:
    """About what saving the adapters takes."""
    kinds = (".lora_", ".modules_to_save.")
    return sum(p.nbytes for name, p in model.named_parameters() if any(kind in name for kind in kinds))


def check_kind(config: object, *, mixed: bool = False) -> None:
    """Refuse other adapters than LoRA.

    Raises:
        ConfigError: the config is of another kind, or the adapter would be one of several kinds.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA or mixed:
        kind = type(config).__name__ + (" with mixed=True" if mixed else "")
        raise ConfigError(f"lora_config: expected a plain peft.LoraConfig, got {kind}; only LoRA is supported")


def _inject(stock: Callable[[], None], tuner: BaseTuner, model: nn.Module, adapter_name: str) -> None:
    request, config = _request.get() or _Request(), tuner.peft_config[adapter_name]
    check_kind(config, mixed=type(tuner).__name__ == "MixedModel")
    _check_values(config)
    _check_holds_none(model)
    expert_lora = request.expert_lora
    if expert_lora is None and not request.is_saved:
        expert_lora = getattr(getattr(model, "kt_config", None), "expert_lora", None)
    prepared = _saved(config) if request.is_saved else prepare_lora_config(model, config, expert_lora)
    if request.is_saved:
        _make_safe(prepared, model)
    lost = lost_biases(model, prepared)
    if lost and not prepared.inference_mode:
        raise ConfigError(options.faults(options.TRAIN, {"bias": prepared.bias}, {options.BIASES: lost[0]}))
    if lost:
        logger.warning("bias 'lora_only': PEFT has not saved biases such as that of %s; the base model's hold", lost[0])
    present = _adapters(model)
    if expert_targets(prepared, expert_names(model)):
        _check_is_first(present)
    if not present:
        expose_placeholders(model)
    tuner.peft_config[adapter_name] = prepared
    with _quiet_about_experts():
        stock()
    dropout = prepared.adapter_dropout or 0.0
    if dropout:
        restore_linear_dropout(model, adapter_name, dropout)
    bind_experts(model, dropout=dropout)
    if not prepared.inference_mode:
        coverage.check(model, prepared, adapter_name)
        coverage.log(model, coverage.asked(config, expert_lora))
        for sentence in training_limits(model, prepared):
            logger.warning("%s", sentence)


def _check_values(config: LoraConfig) -> None:
    """Types and ranges, which PEFT does not look at, and nothing that makes it import modules or copy layers.

    Raises:
        ConfigError: all that is wrong.
    """
    values = plain_values(config)
    faults = [str(fault) for fault in find_faults(values, is_file=False)] + options.faults(options.TRAIN, values)
    if faults:
        raise ConfigError(faults)


def _make_safe(config: LoraConfig, model: nn.Module) -> None:
    """A saved config whose regular expressions come to an end with this model's names, and of whose patterns PEFT sees
    only what has effect where they have more keys than Python keeps compiled.

    Raises:
        FormatError: one that does not.
    """
    names = {name for name, _ in model.named_modules()}
    names |= {f"{name}.{parameter}" for name, m in model.named_modules() for parameter in m._parameters}
    check_speed(vars(config), names, Path(ADAPTER_CONFIG))
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = Patterns.of(getattr(config, key))
        if len(patterns) > _FEW:
            used = {patterns.key_of(name) for name in names}
            setattr(config, key, {pattern: value for pattern, value in patterns.items() if pattern in used})


def _saved(config: LoraConfig) -> ExpertLoraConfig:
    return config if isinstance(config, ExpertLoraConfig) else ExpertLoraConfig.of(config)


def _check_holds_none(model: nn.Module) -> None:
    ours = {id(experts) for _, experts in iter_routed_experts(model)}
    wrappers = [m for m in model.modules() if isinstance(m, ParamWrapper) and id(m.get_base_layer()) in ours]
    _check_is_first(list(dict.fromkeys(name for outer in wrappers for w in chain_of(outer) for name in w.lora_A)))


def _check_is_first(present: list[str]) -> None:
    if present:
        raise ConfigError(
            f"expert LoRA: a model holds one adapter at a time and has {present[0]!r}; "
            "call unload() before loading another one"
        )


def _adapters(model: nn.Module) -> list[str]:
    """Names of the adapters in a model's layers."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    return list(dict.fromkeys(name for m in layers for name in (m.r if isinstance(m, LoraLayer) else ["another"])))


@contextmanager
def _quiet_about_experts() -> Iterator[None]:
    """PEFT warns of every layer type that it does not list, ours included."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type .*RoutedExperts")
        yield
