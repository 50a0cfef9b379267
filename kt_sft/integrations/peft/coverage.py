"""What trains in a model with an adapter, by kind of module, and whether that is what the config asked for."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from kt_sft import env
from kt_sft.errors import ConfigError
from kt_sft.integrations.peft.names import LORA_LAYERS
from kt_sft.integrations.peft.targets import expert_names, expert_targets
from kt_sft.integrations.peft.unwrapped import plain_modules, plain_name, without_adapter
from kt_sft.models.spec import iter_routed_experts

logger = logging.getLogger(__name__)

KINDS = ("attention", "dense MLP", "shared experts", "routed experts", "router", "head", "embedding", "other")
_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|feed_?forward|ffn|moe|^dense|^fc\d$")


@dataclass
class Count:
    """Of one kind: how many modules there are that could train, how many do, and their trainable parameters."""

    present: int = 0
    trained: int = 0
    parameters: int = 0


def count(model: nn.Module) -> dict[str, Count]:
    """What trains, by kind. Routed experts count as two modules a layer: gate and up are one matrix.

    Args:
        model: a PeftModel, or any model with adapters in its layers.
    """
    kind_of, owners = kinds(model), _owners(plain_modules(model), expert_names(model))
    counts = {kind: Count() for kind in KINDS}
    for owner in owners:
        counts[kind_of(owner)].present += 1
    trained: dict[str, int] = {}
    for owner, numel in trainable(model):
        trained[owner] = trained.get(owner, 0) + numel
    for owner, numel in trained.items():
        of_kind = counts[kind_of(owner)]
        of_kind.present += owner not in owners
        of_kind.trained += 1
        of_kind.parameters += numel
    return counts


def kinds(model: nn.Module) -> Callable[[str], str]:
    """What gives the kind of a module by its name without adapters."""
    return _Kinds(model, plain_modules(model), expert_names(model))


def trainable(model: nn.Module) -> Iterator[tuple[str, int]]:
    """(name without adapters of the module, or of the parameter of experts, that trains; elements) of each parameter
    that is trained.
    """
    parameter_of = {
        name: module.parameter_name for name, module in model.named_modules() if hasattr(module, "parameter_name")
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield owner_of(name, parameter_of), parameter.numel()


def owner_of(name: str, parameter_of: Mapping[str, str]) -> str:
    """The module without adapters that a parameter trains; for a wrapped parameter, that parameter.

    Args:
        parameter_of: wrapped parameter by name of the wrapper.
    """
    head = re.split(r"\.(?:lora_\w+|modules_to_save|token_adapter|original_module)\b", name, maxsplit=1)[0]
    if head == name:
        head = name.rpartition(".")[0]
    wrapped = parameter_of.get(head)
    plain = plain_name(head)
    return f"{plain}.{wrapped}" if wrapped else plain


def describe(model: nn.Module) -> str:
    """`attention 8 of 8 modules (921,600 parameters), routed experts 0 of 4, ...`."""
    parts = []
    for kind, of_kind in count(model).items():
        if of_kind.present:
            numel = f" ({of_kind.parameters:,} parameters)" if of_kind.trained else ""
            parts.append(f"{kind} {of_kind.trained} of {of_kind.present}{numel}")
    return ", ".join(parts)


def asked(config: LoraConfig, expert_lora: bool | None) -> str:
    """What a config and the setting beside it ask for, in short."""
    target = config.target_modules
    shown = [target] if isinstance(target, str) else sorted(target or ())
    shown += config.target_parameters or []
    text = ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
    saved = f"; modules_to_save: {', '.join(config.modules_to_save)}" if config.modules_to_save else ""
    setting = "" if expert_lora is None else f"; expert_lora: {str(expert_lora).lower()}"
    return f"{text or 'the default'}{saved}{setting}"


def log(model: nn.Module, what: str) -> None:
    """One line, also where nobody has set up logging: what was asked, and what trains."""
    if env.local_rank() == 0:
        logger.warning("LoRA asked for: %s; modules that train: %s", what, describe(model))


def check(model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
    """Whether everything that a prepared config names has the adapter, and trains.

    Raises:
        ConfigError: names the first module that does not.
    """
    faults = list(_faults(model, config, adapter_name))
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ConfigError(f"LoRA target: {faults[0]}{more}; report it, or leave it out of the target")


def _faults(model: nn.Module, config: LoraConfig, adapter_name: str) -> Iterator[str]:
    layers: dict[str, nn.Module] = {}
    parameters: dict[str, nn.Module] = {}
    saved = []
    for name, module in model.named_modules():
        plain = plain_name(name)
        if isinstance(module, LoraLayer):
            wrapped = getattr(module, "parameter_name", None)
            (layers if wrapped is None else parameters)[f"{plain}.{wrapped}" if wrapped else plain] = module
        elif isinstance(module, AuxiliaryTrainingWrapper):
            saved.append(plain)
    experts = {plain_name(name): module for name, module in iter_routed_experts(model)}
    for name, module in plain_modules(model).items():
        is_target = config.target_modules and check_target_module_exists(config, name)
        if is_target and isinstance(module, LORA_LAYERS) and not _trains(layers.get(name), adapter_name):
            yield f"{name} was asked for and does not train"
    for name in expert_targets(config, experts):
        lora = experts[name.rpartition(".")[0]].lora
        pair = None if lora is None else lora.gate_up if name.endswith("gate_up_proj") else lora.down
        if pair is None or not _trains(parameters.get(name), adapter_name):
            yield f"{name} was asked for and does not train"
    for entry in config.modules_to_save or ():
        if not any(name.endswith(entry) for name in saved) and entry not in ("classifier", "score"):
            yield f"modules_to_save: {entry} was asked for and does not train"


def _trains(layer: BaseTunerLayer | None, adapter_name: str) -> bool:
    if layer is None or adapter_name not in layer.r:
        return False
    own = [p for name, p in layer.named_parameters() if "lora_" in name and f".{adapter_name}" in f".{name}"]
    is_active = adapter_name in layer.active_adapters
    return bool(own) and (all(p.requires_grad for p in own) or not is_active)


def _owners(modules: Mapping[str, nn.Module], experts: list[str]) -> set[str]:
    """What could train: layers that LoRA wraps, and the experts' matrices."""
    layers = {name for name, module in modules.items() if isinstance(module, LORA_LAYERS)}
    return layers | {f"{name}.{projection}" for name in experts for projection in ("gate_up_proj", "down_proj")}


class _Kinds:
    """The kind of a module, by its place beside the experts and its name."""

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], experts: list[str]):
        self.experts = experts
        self.blocks = {name.rpartition(".")[0]: name for name in experts}
        self.routers = {
            name
            for name, module in modules.items()
            if (block := self.blocks.get(name.rpartition(".")[0])) is not None
            and (
                re.search("Router|Gate", type(module).__name__)
                or getattr(module, "out_features", None) == modules[block].num_experts
            )
        }
        inner = getattr(model, "get_base_model", lambda: model)()
        self.ends = {}
        for side, kind in (("output", "head"), ("input", "embedding")):
            module = getattr(inner, f"get_{side}_embeddings", lambda: None)()
            if module is not None:
                self.ends[id(without_adapter(module))] = kind
        self.modules = modules
        self.layers = {match.group(1) for name in experts if (match := re.match(r"(.*?\.?layers\.)\d+\.", name))}

    def __call__(self, name: str) -> str:
        module = self.modules.get(name)
        kind = self.ends.get(id(module))
        if kind is None and isinstance(module, nn.Embedding):
            kind = "embedding"
        if kind is not None:
            return kind
        if any(name == e or name.startswith(f"{e}.") for e in self.experts):
            return "routed experts"
        if any(name == r or name.startswith(f"{r}.") for r in self.routers):
            return "router"
        if self.layers and not name.startswith(tuple(self.layers)):
            return "other"
        parts = name.split(".")
        if any("shared" in part for part in parts):
            return "shared experts"
        if any(_ATTENTION.search(part) for part in parts):
            return "attention"
        return "dense MLP" if any(_MLP.search(part) for part in parts) else "other"
