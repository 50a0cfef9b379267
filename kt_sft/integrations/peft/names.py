"""Names in a LoraConfig that mean nothing in the model, or something that LoRA cannot wrap.

PEFT passes over a name that matches nothing as soon as another one matches, so a mistyped target trains less than it
says. Here each is a fault with the nearest name. Lists that serve many families are common (`q_proj` beside
`q_a_proj`): a name that layers of other families bear is a warning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from peft import LoraConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from kt_sft.compat.peft import check_target_module_exists, custom_layers, get_pattern_key
from kt_sft.errors import nearest

LORA_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, Conv1D)
OF_OTHER_FAMILIES = frozenset(
    name for names in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.values() for name in names
) | frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "in_proj", "qkv_proj")
    + ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj")
    + ("w1", "w2", "w3", "c_fc", "c_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h", "shared_expert_gate")
    + (
        "in_proj_qkvz",
        "in_proj_ba",
        "in_proj_qkv",
        "in_proj_z",
        "in_proj_b",
        "in_proj_a",
        "conv1d",
        "x_proj",
        "dt_proj",
    )
)
# Of the paths in regular expressions that serve many families.
PATHS_OF_OTHER_FAMILIES = frozenset(
    ("language", "text", "vision", "image", "language_model", "text_model", "self_attn", "attention", "attn")
    + ("linear_attn", "mixer", "mlp", "feed_forward", "ffn", "dense", "moe", "block_sparse_moe", "experts")
    + ("shared_expert", "shared_experts", "shared_mlp")
)
# What templates leave out or add on top, wherever there is such a part.
PARTS_OF_OTHER_FAMILIES = OF_OTHER_FAMILIES | frozenset(
    ("lm_head", "embed_tokens", "gate", "router")
    + ("vision_tower", "visual", "vision_model", "multi_modal_projector", "audio_tower")
)
_IS_REGEX = re.compile(r"[\\*+?()\[\]|^$]")  # no name has these
ADDED_BY_PEFT = ("classifier", "score")  # to modules_to_save, for every sequence classifier


@dataclass
class Findings:
    """What is wrong with the names of a config: `faults` stop it, `unused` are of other families."""

    faults: list[str] = field(default_factory=list)
    unused: dict[str, list[str]] = field(default_factory=dict)  # by option

    def unknown(self, option: str, entry: str, known: Iterable[str], common: frozenset[str], what: str) -> None:
        """A name that means nothing."""
        if entry in common:
            self.unused.setdefault(option, []).append(entry)
        else:
            self.faults.append(f"{option}: {entry!r} names no {what}; {_nearest(entry, known)}")


def find(
    config: LoraConfig,
    entries: Iterable[str] | str | None,
    modules: Mapping[str, nn.Module],
    spelled: Mapping[str, object],
    selected: Iterable[str],
    every_parameter: Iterable[str],
) -> Findings:
    """Look at every option that holds names.

    Args:
        config: the prepared one.
        entries: the user's target modules without the names of experts; a regular expression as it is.
        modules: of the model, by the names that they have without adapters.
        spelled: every way to name the experts' matrices.
        selected: the experts' parameters that are trained.
        every_parameter: names of the model's parameters, the experts' included.
    """
    found = Findings()
    _target_modules(found, config, entries, modules, spelled)
    _exclude_modules(found, config, modules, spelled)
    _layers(found, config, modules)
    _patterns(found, config, modules, selected, every_parameter)
    saved = [entry for entry in config.modules_to_save or [] if entry not in ADDED_BY_PEFT]
    indices = config.trainable_token_indices
    for option, names in (("modules_to_save", saved), ("trainable_token_indices", indices or ())):
        for entry in names if not isinstance(names, list) or option == "modules_to_save" else ():
            if not any(name.endswith(entry) for name in modules):  # PEFT's rule
                found.unknown(option, entry, modules, frozenset(), "module of the model")
    layers = [name for name, module in modules.items() if isinstance(module, LORA_LAYERS)]
    if entries and not config.target_parameters and not found.faults:
        is_of_one_expert = isinstance(entries, str) and not _matches_any(entries, modules)  # a fault of its own
        if not is_of_one_expert and not any(check_target_module_exists(config, name) for name in layers):
            shown = entries if isinstance(entries, str) else ", ".join(sorted(entries))
            text = "names no layer of the model that the other options leave in; known"
            found.faults.append(f"target_modules: {shown} {text}: {_nearest('', layers).removeprefix('known: ')}")
    return found


def suffix_matches(entry: str, names: Iterable[str]) -> list[str]:
    """Names that a list entry means, by PEFT's rule."""
    return [name for name in names if name == entry or name.endswith(f".{entry}")]


def _target_modules(found: Findings, config: LoraConfig, entries, modules, spelled) -> None:
    lora_names = [name for name, module in modules.items() if isinstance(module, LORA_LAYERS)]
    known = [*lora_names, *(name for name in spelled if not re.search(r"\.\d+(\.\w+)?$", name))]
    if isinstance(entries, str):
        common = OF_OTHER_FAMILIES | PATHS_OF_OTHER_FAMILIES
        _regex(found, "target_modules", entries, [*modules, *spelled], known, common)
        hits = {entries: list(modules)}
    else:
        hits = {entry: suffix_matches(entry, modules) for entry in sorted(entries or ())}
        for entry, names in hits.items():
            if not names and _IS_REGEX.search(entry):
                found.faults.append(
                    f"target_modules: {entry!r} is an entry of a list, which holds names and no regular expression; "
                    "pass it alone, as a string"
                )
            elif not names:
                found.unknown("target_modules", entry, known, OF_OTHER_FAMILIES, "layer of the model")
    custom = custom_layers(config)
    for entry, names in hits.items():
        wrong = [
            name
            for name in names
            if not isinstance(modules[name], (*LORA_LAYERS, *custom)) or config.r % _groups(modules[name])
        ]
        wrong = [name for name in wrong if config.target_modules and check_target_module_exists(config, name)]
        if wrong:
            kind = type(modules[wrong[0]]).__name__
            fault = f"target_modules: {entry!r} names {wrong[0]}, {_unwrappable(modules[wrong[0]], kind)}"
            if len(wrong) < len(names) and not config.exclude_modules:  # such as those of a vision tower
                part = wrong[0].removeprefix("model.").partition(".")[0]
                fault += f", or set exclude_modules: '.*{part}.*'" if part != "layers" else ""
            found.faults.append(fault)


def _groups(module: nn.Module) -> int:
    """PEFT's rank has to be a multiple of a convolution's groups."""
    return getattr(module, "groups", 1) if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else 1


def _unwrappable(module: nn.Module, kind: str) -> str:
    if (groups := _groups(module)) > 1:
        return f"a {kind} in {groups} groups, which LoRA's rank would have to be a multiple of; leave it out"
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        return f"whose {kind} LoRA cannot wrap; name its parameter in target_parameters, or leave it out"
    return f"a {kind} that LoRA cannot wrap; name the linear layers in it"


def _exclude_modules(found: Findings, config: LoraConfig, modules, spelled) -> None:
    excluded, every = config.exclude_modules, [*modules, *spelled]
    if isinstance(excluded, str):
        common = PARTS_OF_OTHER_FAMILIES | PATHS_OF_OTHER_FAMILIES
        _regex(found, "exclude_modules", excluded, every, modules, common)
        return
    for entry in sorted(excluded or ()):
        if not suffix_matches(entry, every):
            found.unknown("exclude_modules", entry, modules, PARTS_OF_OTHER_FAMILIES, "module of the model")


def _layers(found: Findings, config: LoraConfig, modules) -> None:
    """layers_pattern and layers_to_transform, by PEFT's reading of a module's name."""
    asked = config.layers_to_transform
    asked = [] if asked is None else [asked] if isinstance(asked, int) else list(asked)
    patterns = config.layers_pattern or []
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    lists = sorted({match.group(1) for name in modules for match in re.finditer(r"\.([^.]+)\.\d+\.", f".{name}.")})
    for pattern in patterns:
        if not any(re.match(rf".*\.{pattern}\.(\d+)\.", name) for name in modules):
            found.unknown("layers_pattern", pattern, lists, frozenset(), "list of layers of the model")
    if not asked:
        return
    of_layer = [rf".*\.{pattern}\.(\d+)\." for pattern in patterns] or [r".*\.[^.]*\.(\d+)\."]
    there = {int(m.group(1)) for name in modules for p in of_layer if (m := re.match(p, name))}
    if (missing := sorted(set(asked) - there)) and there:
        has = f"layers {min(there)} to {max(there)}"
        found.faults.append(f"layers_to_transform: expected {has} of the model, found {', '.join(map(str, missing))}")


def _patterns(found: Findings, config: LoraConfig, modules, selected, every_parameter) -> None:
    """rank_pattern and alpha_pattern have effect on what gets LoRA only."""
    if not (config.rank_pattern or config.alpha_pattern):
        return
    targets = [name for name in modules if config.target_modules and check_target_module_exists(config, name)]
    targets += selected
    for entry in config.target_parameters or ():
        targets += suffix_matches(entry, every_parameter)
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, option) or {}:
            if (fault := broken(option, key)) is not None:
                found.faults.append(fault)
            elif not any(get_pattern_key([key], name) == key for name in targets):
                common = frozenset() if suffix_matches(key, modules) else OF_OTHER_FAMILIES
                found.unknown(option, key, targets, common, "module or parameter that gets LoRA")


def _regex(found: Findings, option: str, pattern: str, names, known, common: frozenset[str]) -> None:
    """A regular expression that matches nothing, or has an alternative of plain names that matches nothing."""
    if not _matches_any(pattern, names):
        if suffix_matches(pattern, names):
            found.faults.append(f"{option}: {pattern!r} is matched with whole names; pass a list: [{pattern!r}]")
            return
        found.unknown(option, pattern, known, frozenset(), "module of the model")
        return
    for word, narrowed in _alternatives(pattern):
        if not _matches_any(narrowed, names):
            found.unknown(option, word, known, common, "module of the model")


def _alternatives(pattern: str) -> Iterator[tuple[str, str]]:
    """(name, the pattern with no other one in its group) for each group like `(q_proj|v_proj)`."""
    for group in re.finditer(r"\((?:\?:)?((?:\w|\\?\.)+(?:\|(?:\w|\\?\.)+)+)\)", pattern):
        for word in group.group(1).split("|"):
            yield word.replace("\\", ""), f"{pattern[: group.start(1)]}{word}{pattern[group.end(1) :]}"


def _matches_any(pattern: str, names: Iterable[str]) -> bool:
    matches: Callable[[str], object] = re.compile(pattern).fullmatch
    return any(matches(name) for name in names)


def broken(option: str, pattern: str) -> str | None:
    """The fault of a regular expression that is none."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{option}: {pattern!r} is no regular expression ({error}); escape or mend it"
    return None


def _nearest(entry: str, known: Iterable[str]) -> str:
    """A hint by the last parts of names, as many as the entry has, at most two."""
    depth = min(entry.count(".") + 1, 2)
    tails = sorted({".".join(name.split(".")[-depth:]) for name in known} - {""})
    hint = nearest(".".join(entry.split(".")[-depth:]), tails)
    if hint.startswith("did you mean"):
        return hint
    return nearest(entry, sorted({name.rpartition(".")[2] for name in known if name and not name[-1].isdigit()}))
