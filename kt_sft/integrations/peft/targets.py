"""From the user's LoraConfig to one that PEFT accepts for routed experts.

Four things stand between the two. Routed experts are Parameters, so `target_modules` never reaches them: they go into
`target_parameters`. DeepSeek-V2's router is an `nn.Linear`, so `all-linear` would train it: it is excluded. A sparse
attention's indexer chooses keys and has no gradient: it is excluded, too. PEFT's ParamWrapper refuses dropout: the
config says 0 while the user's value travels beside it.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterable

import peft
from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from kt_sft.adapters import layout
from kt_sft.adapters.patterns import Patterns
from kt_sft.errors import ConfigError, nearest
from kt_sft.formats.overwriting import saved_into
from kt_sft.integrations.peft import names
from kt_sft.integrations.peft.unwrapped import plain_modules, plain_name
from kt_sft.models.spec import find_routers, iter_routed_experts

logger = logging.getLogger(__name__)
_matches = names.suffix_matches

SIDE_FILE = "kt_sft.json"
RUNNING_FORM = layout.form_of(peft.__version__)  # in which the PEFT that runs writes LoRA of fused experts
MAX_RANK = 256
ALL_LINEAR = ("all", "all-linear")
PROJECTIONS = ("gate_up_proj", "down_proj")
# How checkpoints and older adapters call the matrices of one expert -> the fused parameter that holds them.
ALIASES = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "gate_up_proj", "w3": "gate_up_proj"}
ALIASES |= {"down_proj": "down_proj", "w2": "down_proj"}
_HALVES = ({"gate_proj", "w1"}, {"up_proj", "w3"})
Spellings = dict[str, tuple[set[str], int | None]]  # name -> (parameters meant, which expert; None: all of the layer)
_SINGLE = re.compile(r"(^|\.)\d+(\.\w+)?$")  # ends like the name of one expert, or of one of its matrices


class ExpertLoraConfig(LoraConfig):
    """A LoraConfig that keeps, outside PEFT's fields, what plain PEFT could not load.

    `lora_dropout` must be 0 in `adapter_config.json` as soon as `target_parameters` is set, or PEFT's ParamWrapper
    raises at load. The user's value is `adapter_dropout`; `save_pretrained` writes it to `kt_sft.json` beside it.
    """

    adapter_dropout = None  # float once it has been moved; no annotation, or asdict would write it
    model_type = None

    @classmethod
    def of(cls, config: LoraConfig) -> ExpertLoraConfig:
        """A copy of `config` with this class; dropout still where the user put it."""
        copied = copy.deepcopy(config)
        copied.__class__ = cls
        return copied

    def move_dropout(self, saved: float | None = None) -> None:
        """Take the dropout out of PEFT's sight; `saved` is the value found beside a loaded adapter."""
        if self.adapter_dropout is None:
            self.adapter_dropout = self.lora_dropout if saved is None else saved
        self.lora_dropout = 0.0

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        with saved_into(save_directory) as staging:
            super().save_pretrained(str(staging), **kwargs)
            beside = {"model_type": self.model_type, layout.MARK: RUNNING_FORM}
            if self.adapter_dropout is not None:
                beside["lora_dropout"] = self.adapter_dropout
            (staging / SIDE_FILE).write_text(json.dumps(beside, indent=2) + "\n", encoding="utf-8")


def prepare_lora_config(model: nn.Module, lora_config: LoraConfig, expert_lora: bool | None = None) -> ExpertLoraConfig:
    """The config to build the adapter with; the user's object is left alone. Preparing twice changes nothing.

    Args:
        model: a model with `RoutedExperts`, before any adapter.
        lora_config: PEFT's own config. `target_modules` may also be `"all"`, and may name experts: `experts`,
            `gate_up_proj`, `mlp.experts.down_proj`, a module path, or a regular expression. A name that an `nn.Linear`
            bears (`down_proj` where dense or shared MLPs exist) means those, not the experts.
        expert_lora: True for LoRA on every routed expert (only on the matrices that the target names, if it names any);
            False for none; None asks `model.kt_config.expert_lora`, and None there means when the target is all-linear
            or names experts.
    Raises:
        ConfigError: options that expert LoRA cannot honour, names that match nothing, nothing to train.
    """
    config = ExpertLoraConfig.of(lora_config)
    config.model_type = getattr(getattr(model, "config", None), "model_type", None)
    if expert_lora is None:
        expert_lora = getattr(getattr(model, "kt_config", None), "expert_lora", None)

    regexes = {"target_modules": config.target_modules, "exclude_modules": config.exclude_modules}
    if broken := [names.broken(name, p) for name, p in regexes.items() if isinstance(p, str) and names.broken(name, p)]:
        raise ConfigError(broken)
    modules, experts = plain_modules(model), expert_names(model)
    faults = _unknown_parameters(model, config, experts)
    shorthand = _split_shorthand(config)
    spelled = _spellings(modules, experts, singles=_may_name_one(config.target_modules))
    by_parameter = {p for entry in config.target_parameters or [] for p in _matches(entry, _expert_parameters(experts))}
    by_module, dense = _take_expert_names(config, modules, spelled, faults)
    named, entries = by_parameter | by_module, config.target_modules
    if shorthand:
        config.target_modules = _every_linear(model, config) | set(entries or ())
    if expert_lora is False and named:
        logger.warning("expert LoRA is off: the routed experts named in the LoRA target are left out")
    selected = set() if expert_lora is False else named
    if expert_lora is not False and ((shorthand and not by_parameter) or (expert_lora and not named)):
        selected = set(_expert_parameters(experts))
    selected = {parameter for parameter in selected if _is_kept(config, parameter)}

    for what, linears in (("router", router_linears(model)), ("indexer of attention", indexer_linears(model))):
        _exclude(config, [name for name in linears if _is_matched(config, name)], what=what)
    _exclude(config, [name for name in experts if _is_matched(config, name)], what="")
    others = [entry for entry in config.target_parameters or [] if not _matches(entry, _expert_parameters(experts))]
    config.target_parameters = (others + _compact(model, experts, selected)) or None
    if config.target_modules is None and config.target_parameters and not lora_config.target_parameters:
        logger.info("target_modules is not set: PEFT's default for %s applies besides the experts", config.model_type)

    found = names.find(config, entries, modules, spelled, selected, _every_parameter(model, experts))
    faults += found.faults + _faults(config, selected, experts, expert_lora)
    if faults:
        raise ConfigError(faults)
    for option, unused in found.unused.items():
        logger.warning("%s: %s: no such layer in %s; without effect", option, ", ".join(unused), config.model_type)
    _warn_of_halves(dense, by_module, selected, expert_lora)
    if selected or config.target_parameters:  # PEFT refuses both
        config.move_dropout()
    return config


def expert_names(model: nn.Module) -> list[str]:
    """Names of the routed experts without adapters."""
    return [plain_name(name) for name, _ in iter_routed_experts(model)]


def expert_targets(config: LoraConfig, experts: Iterable[str]) -> list[str]:
    """Full names of the experts' parameters that `config.target_parameters` names, in PEFT's nesting order."""
    entries = config.target_parameters or []
    return [name for name in _expert_parameters(experts) if any(_matches(entry, [name]) for entry in entries)]


def effective_rank(config: LoraConfig, parameter: str) -> int:
    """The rank that PEFT gives to a parameter or module of this name."""
    patterns = Patterns.of(config.rank_pattern)
    key = patterns.key_of(parameter)
    return config.r if key is None else patterns[key]


def router_linears(model: nn.Module) -> list[str]:
    """Routers that are `nn.Linear` (DeepSeek-V2's `mlp.gate`), so that a LoRA target could hit them.

    Routers that hold a bare Parameter cannot be hit.
    """
    experts = {plain_name(name): module for name, module in iter_routed_experts(model)}
    return list(find_routers(model, {name: module.gate_up_proj.shape[0] for name, module in experts.items()}))


def indexer_linears(model: nn.Module) -> list[str]:
    """Linear layers of indexers (GLM-5, DeepSeek-V3.2), which choose what attention sees: no gradient reaches them."""
    modules = plain_modules(model)
    indexers = tuple(f"{name}." for name, module in modules.items() if type(module).__name__.endswith("Indexer"))
    return [name for name, m in modules.items() if name.startswith(indexers) and isinstance(m, nn.Linear)]


def frozen_linears(model: nn.Module) -> set[str]:
    """Linear layers that no target trains by `target_modules`."""
    return {*router_linears(model), *indexer_linears(model)}


def _expert_parameters(experts: Iterable[str]) -> list[str]:
    return [f"{name}.{projection}" for name in experts for projection in PROJECTIONS]


def _split_shorthand(config: LoraConfig) -> bool:
    """Whether the target asks for every linear layer; what it names beside that is left in `target_modules`."""
    target = config.target_modules
    entries = [target] if isinstance(target, str) else list(target or [])
    others = {entry for entry in entries if entry.lower() not in ALL_LINEAR}
    if len(others) == len(entries):
        return False
    config.target_modules = others
    return True


def _every_linear(model: nn.Module, config: LoraConfig) -> set[str]:
    """What PEFT takes for all-linear, without the routers and without the layers that the config leaves out."""
    probe = copy.copy(config)
    probe.target_modules = "all-linear"
    found = _maybe_include_all_linear_layers(probe, model).target_modules - frozen_linears(model)
    if config.layers_to_transform is None:
        return found
    return {name for name in found if _is_left_in(config, name)}


def _may_name_one(target: object) -> bool:
    """Whether a target could name one expert of a layer: every expert of each has to be spelled then."""
    return isinstance(target, str) or any(_SINGLE.search(entry) for entry in target or ())


def _spellings(modules: dict[str, nn.Module], experts: list[str], *, singles: bool) -> Spellings:
    """Every way to name the experts' matrices; with `singles` also those of one expert."""
    spelled: Spellings = {}
    for name in experts:
        both = {f"{name}.{projection}" for projection in PROJECTIONS}
        spelled[name] = (both, None)
        for spelling, projection in (*((p, p) for p in PROJECTIONS), *ALIASES.items()):
            spelled[f"{name}.{spelling}"] = ({f"{name}.{projection}"}, None)
        for index in range(modules[name].num_experts if singles else 0):
            spelled[f"{name}.{index}"] = (both, index)
            for alias, projection in ALIASES.items():
                spelled[f"{name}.{index}.{alias}"] = ({f"{name}.{projection}"}, index)
    return spelled


def _take_expert_names(
    config: LoraConfig, modules: dict[str, nn.Module], spelled: Spellings, faults: list[str]
) -> tuple[set[str], list[str]]:
    """Take the names of experts out of `config.target_modules`; a regular expression stays as it is.

    Returns:
        Full names of the experts' parameters that are meant, and the list entries that experts' matrices share with
        dense layers, which are meant.
    """
    target = config.target_modules
    if not target:
        return set(), []
    if isinstance(target, str):
        matches = re.compile(target).fullmatch
        return _whole(target, [name for name in spelled if matches(name)], modules, spelled, faults), []

    known = {name for name, module in modules.items() if isinstance(module, names.LORA_LAYERS)}
    kept, dense, named, single, taken = set(), [], set(), [], set()
    for entry in sorted(target):
        is_single = _SINGLE.search(entry) is not None
        meant = [name for name in _matches(entry, spelled) if is_single or spelled[name][1] is None]
        if not meant or (is_single and _matches(entry, modules)):
            kept.add(entry)
        elif _matches(entry, known):
            kept.add(entry)
            dense.append(entry)
        elif is_single:
            single += meant
        else:
            taken.add(entry.rpartition(".")[2])
            named.update(*(spelled[name][0] for name in meant))
    named |= _whole(None, single, modules, spelled, faults)
    halves = [half for half in _HALVES if half & taken]
    if len(halves) == 1 and not {"gate_up_proj", "experts"} & taken:
        logger.warning(
            "LoRA target %s: gate and up of the routed experts are one matrix; both train", ", ".join(halves[0] & taken)
        )
    config.target_modules = kept
    return named, dense


def _whole(
    pattern: str | None,
    hits: list[str],
    modules: dict[str, nn.Module],
    spelled: Spellings,
    faults: list[str],
) -> set[str]:
    """The parameters that `hits` name; naming some experts of a layer is a fault: their factors are one parameter."""
    whole: set[str] = set()
    indices: dict[str, dict[int, str]] = {}
    for name in hits:
        parameters, index = spelled[name]
        if index is None:
            whole |= parameters
            continue
        for parameter in parameters:
            indices.setdefault(parameter, {})[index] = name
    for parameter, by_index in indices.items():
        count = modules[parameter.rpartition(".")[0]].num_experts
        if len(by_index) == count:
            whole.add(parameter)
        elif parameter not in whole:
            entry = pattern or next(iter(by_index.values()))
            faults.append(
                f"target_modules: {entry!r} names {len(by_index)} of {count} experts; those of a layer are trained "
                f"together: name {parameter!r}, or 'experts'"
            )
            break
    return whole


def _warn_of_halves(dense: list[str], by_module: set[str], selected: set[str], expert_lora: bool | None) -> None:
    if dense and not selected and expert_lora is None:
        logger.warning(
            "LoRA target %s: means the dense and shared layers of that name; the routed experts stay frozen; add "
            "'experts' to the target, or set expert_lora (LLaMA-Factory: kt_expert_lora: true)",
            ", ".join(dense),
        )


def _is_kept(config: LoraConfig, parameter: str) -> bool:
    """Whether exclude_modules and layers_to_transform leave this expert parameter in; PEFT itself would not look."""
    return all(_is_left_in(config, name) for name in (parameter.rpartition(".")[0], parameter))


def _is_left_in(config: LoraConfig, name: str) -> bool:
    probe = copy.copy(config)
    probe.target_modules = {name.rpartition(".")[2]}  # PEFT looks at the layer's number for suffixes only
    return bool(check_target_module_exists(probe, name))


def _is_matched(config: LoraConfig, module_name: str) -> bool:
    return bool(config.target_modules) and bool(check_target_module_exists(config, module_name))


def _exclude(config: LoraConfig, names: list[str], *, what: str) -> None:
    """Add full module names to `exclude_modules`, whichever form the user gave."""
    if not names:
        return
    if what:
        logger.warning("LoRA target: %s %s stays frozen", what, ", ".join(names))
    if isinstance(config.exclude_modules, str):
        config.exclude_modules = "|".join([f"(?:{config.exclude_modules})", *map(re.escape, names)])
    else:
        config.exclude_modules = set(config.exclude_modules or ()) | set(names)


def _every_parameter(model: nn.Module, experts: list[str]) -> set[str]:
    return {name for name, _ in model.named_parameters()} | set(_expert_parameters(experts))


def _unknown_parameters(model: nn.Module, config: LoraConfig, experts: list[str]) -> list[str]:
    if not config.target_parameters:
        return []
    every = _every_parameter(model, experts)
    tails = {".".join(name.split(".")[-3:]) for name in _expert_parameters(experts)}
    return [
        f"target_parameters: {entry!r} names no parameter of the model; {nearest(entry, tails)}"
        for entry in config.target_parameters
        if not _matches(entry, every)
    ]


def _compact(model: nn.Module, experts: list[str], selected: set[str]) -> list[str]:
    """`mlp.experts.down_proj` instead of one name per layer, where it means exactly the selected parameters."""
    every = _every_parameter(model, experts)
    entries = []
    for projection in PROJECTIONS:
        names = {name for name in selected if name.rpartition(".")[2] == projection}
        suffixes = {".".join(name.split(".")[-3:]) for name in names}
        if len(suffixes) == 1 and set(_matches(next(iter(suffixes)), every)) == names:
            entries += suffixes
        else:
            entries += sorted(names)
    return entries


def _faults(config: LoraConfig, selected: set[str], experts: list[str], expert_lora: bool | None) -> list[str]:
    faults = []
    if expert_lora and not experts:
        faults.append("expert_lora=True: the model has no routed experts; load it with kt_sft.load_model")
    for entry in config.modules_to_save or []:
        hit = [name for name in experts if re.match(rf"(^|.*\.){entry}($|\..*)", name)]
        if hit:
            faults.append(
                f"modules_to_save: {entry!r} contains the frozen routed experts {hit[0]}; name their siblings"
            )
    if not config.target_modules and not config.target_parameters and config.target_modules is not None:
        faults.append("LoRA target: nothing is left to train; name linear layers, 'experts', or 'all-linear'")
    return faults + expert_faults(config, selected)


def expert_faults(config: LoraConfig, selected: Iterable[str]) -> list[str]:
    """What LoRA on the selected expert parameters cannot honour, one sentence each; none if nothing is selected."""
    if not selected:
        return []
    off = "or set expert_lora=False to train without the experts"
    faults = []
    for option in ("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "layer_replication", "arrow_config"):
        if getattr(config, option, None):
            faults.append(f"{option}: expert LoRA does not support it; remove {option}, {off}")
    if getattr(config, "alora_invocation_tokens", None) is not None:
        faults.append(f"alora_invocation_tokens: expert LoRA does not support aLoRA; remove it, {off}")
    init = config.init_lora_weights
    if not isinstance(init, bool) and str(init).lower() != "gaussian":
        faults.append(f"init_lora_weights: expert LoRA needs True, False or 'gaussian', got {init!r}; change it, {off}")
    ranks = {effective_rank(config, parameter): parameter for parameter in sorted(selected)}
    for rank, parameter in ranks.items():
        if not 1 <= rank <= MAX_RANK:
            faults.append(
                f"r: expert LoRA needs a rank of 1 to {MAX_RANK}, got {rank} for {parameter}; lower it, {off}"
            )
    dropout = config.lora_dropout
    if not 0.0 <= dropout < 1.0:
        faults.append(f"lora_dropout: expected 0 <= p < 1, got {dropout}")
    return faults
