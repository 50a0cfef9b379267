"""adapter_config.json of PEFT: reading ranks and scales off it, and writing one that fits an adapter."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from kt_sft.adapters import layout, options, schema
from kt_sft.adapters.folder import SIDE_FILE
from kt_sft.adapters.model import PARAMETERS, Adapter, BaseModel
from kt_sft.adapters.patterns import Patterns, tails
from kt_sft.errors import FormatError
from kt_sft.formats.file_names import ADAPTER_CONFIG
from kt_sft.formats.json_object import read_object
from kt_sft.formats.staging import put_json

_WITHOUT = "restore the file or delete it (dropout is then 0)"
ALL_LINEAR = "all-linear"
# PEFT 0.19 takes target_modules that end so for the matrices of experts, dense and shared MLPs included; as
# target_parameters they are left alone, and their tensors are the same.
_TAKEN_FOR_EXPERTS = (".gate_proj", ".up_proj", ".down_proj", ".w1", ".w2", ".w3")
_BESIDE: dict[str, tuple[Callable[[Any], bool], str]] = {  # keys of kt_sft.json
    "model_type": (lambda value: value is None or (isinstance(value, str) and len(value) <= 200), "a model type"),
    "lora_dropout": (schema.is_dropout, "a number from 0 to below 1"),
    layout.MARK: (lambda value: value is None or value in layout.LAYOUTS, f"one of {', '.join(layout.LAYOUTS)}"),
}


def read_config(folder: Path, door: str = options.READ) -> dict[str, Any]:
    """Values of adapter_config.json that mean something, checked.

    Args:
        door: whoever reads it, of `options`.
    Raises:
        FormatError: missing, no JSON object, not LoRA, values that it cannot have, or options that the door refuses.
    """
    path = folder / ADAPTER_CONFIG
    if not os.path.lexists(path):
        raise FormatError(folder, f"no {ADAPTER_CONFIG} in it", remedy="name the directory that save_pretrained wrote")
    values = schema.checked(read_object(path), path)
    options.check_file(door, values, path)
    return values


def read_side_file(folder: Path) -> dict[str, Any]:
    """Values of kt_sft.json; empty where there is none.

    Raises:
        FormatError: no JSON object, or values that it cannot have.
    """
    path = folder / SIDE_FILE
    if not os.path.lexists(path):
        return {}
    try:
        values = read_object(path)
    except FormatError as error:
        raise FormatError(path, "content", found=str(error), remedy=_WITHOUT) from None
    for key, (accepts, expected) in _BESIDE.items():
        if key in values and not accepts(values[key]):
            raise FormatError(path, key, expected=expected, found=repr(values[key])[:80], remedy=_WITHOUT)
    return {key: values[key] for key in _BESIDE if key in values}


def write_side_file(folder: Path, model_type: str | None, dropout: float | None, layout_name: str | None) -> None:
    """kt_sft.json into a folder of staging.

    Args:
        dropout: with which it was trained, where PEFT's config cannot say it.
        layout_name: of the LoRA of fused experts.
    """
    values = {"model_type": model_type, "lora_dropout": dropout, layout.MARK: layout_name}
    kept = {key: value for key, value in values.items() if value is not None or key == "model_type"}
    put_json(folder / SIDE_FILE, kept)


def rank_of(config: Mapping[str, Any], target: str) -> int:
    """What PEFT takes for the rank of a module or parameter."""
    return int(_by_pattern(config.get("rank_pattern"), target, config["r"]))


def scale_of(config: Mapping[str, Any], target: str, rank: int) -> float:
    """What PEFT multiplies b a with."""
    alpha = float(_by_pattern(config.get("alpha_pattern"), target, config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def has_pattern(patterns: Mapping[str, Any] | None, target: str) -> bool:
    """Whether a rank_pattern or alpha_pattern has a key for a module or parameter."""
    return Patterns.of(patterns).key_of(target) is not None


def dropout_of(adapter: Adapter) -> float:
    """The dropout that an adapter was trained with, wherever its files keep it."""
    return float(adapter.beside.get("lora_dropout", adapter.config.get("lora_dropout") or 0.0))


def _by_pattern(patterns: Mapping[str, Any] | None, target: str, default: Any) -> Any:
    found = Patterns.of(patterns)
    key = found.key_of(target)
    return default if key is None else found[key]


def target_test(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether PEFT would put LoRA on a module of a name, by `target_modules` and what narrows it down."""
    wanted, excluded = config.get("target_modules"), config.get("exclude_modules")
    is_wanted, is_excluded = _name_test(wanted), _name_test(excluded)
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    given = config.get("layers_pattern") or []
    of_layer = [rf".*\.{pattern}\.(\d+)\." for pattern in ([given] if isinstance(given, str) else given)]
    exact = set(wanted) if isinstance(wanted, list | set) else set()

    def test(name: str) -> bool:
        if excluded and is_excluded(name):
            return False
        if wanted is None:  # PEFT's own default for the family, which it alone knows
            return not config.get("target_parameters")
        if not is_wanted(name):
            return False
        if not layers or name in exact or isinstance(wanted, str):
            return True
        found = next(filter(None, (re.match(p, name) for p in of_layer or [r".*\.[^.]*\.(\d+)\."])), None)
        return found is not None and int(found[1]) in layers

    return test


def _name_test(entries: Any) -> Callable[[str], bool]:
    """Whether a name is meant by a regular expression, or by the end of a name in a list."""
    if isinstance(entries, str):
        if entries.lower() == ALL_LINEAR:
            return lambda name: True
        matches = re.compile(entries).fullmatch
        return lambda name: matches(name) is not None
    known = set(entries or ())
    return lambda name: any(tail in known for tail in tails(name))


def named_parameters(config: Mapping[str, Any], module: str) -> list[str]:
    """Which of an experts module's parameters `target_parameters` names, in the order in which PEFT nests wrappers."""
    return [name for name in (f"{module}.{parameter}" for parameter in PARAMETERS) if is_parameter(config, name)]


def is_parameter(config: Mapping[str, Any], name: str) -> bool:
    """Whether `target_parameters` names a parameter."""
    return any(name == entry or name.endswith(f".{entry}") for entry in config.get("target_parameters") or ())


def uniform(adapter: Adapter) -> tuple[int, float]:
    """A rank that holds all of an adapter's targets, and a scale: that of most of them."""
    rank = max(adapter.ranks.values(), default=1)
    return rank, Counter(adapter.scales.values()).most_common(1)[0][0] if adapter.scales else 1.0


def fused_config(adapter: Adapter, ranks: Mapping[str, int], scales: Mapping[str, float], release: str) -> dict:
    """adapter_config.json for fused experts.

    Args:
        ranks: by parameter, Linear or embedding, as they are written; `scales` likewise.
        release: of PEFT, whose layout the tensors have.
    """
    common_rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    common_scale = Counter(scales.values()).most_common(1)[0][0] if scales else 1.0
    alpha = common_scale * common_rank
    config = _frame(adapter, common_rank, alpha, release)
    parameters = _shortened([target for target in ranks if is_of_experts(target, adapter.base)], adapter.base)
    parameters += _shortened_bare(adapter)
    apart = [name for name in adapter.linears if release >= "0.19" and name.endswith(_TAKEN_FOR_EXPERTS)]
    config["target_modules"] = target_names(adapter, [name for name in adapter.linears if name not in apart])
    config["target_modules"] += [name for name in ranks if f"{name}.weight" in adapter.base.bare]  # embeddings
    config["target_parameters"] = [*parameters, *(f"{name}.weight" for name in apart)] or None
    if config["target_parameters"]:
        config["lora_dropout"] = 0.0  # PEFT refuses another with target_parameters; the user's lies beside it
    config["rank_pattern"] = _pattern(ranks, common_rank, adapter.base)
    config["alpha_pattern"] = _pattern({name: scales[name] * ranks[name] for name in ranks}, alpha, adapter.base)
    return config


def plain_config(adapter: Adapter, rank: int, scale: float, targets: Iterable[str]) -> dict[str, Any]:
    """adapter_config.json for engines that read one rank and one alpha for all modules."""
    config = _frame(adapter, rank, rank * scale, "0.18.1")
    return config | {"target_modules": sorted(targets), "target_parameters": None, "bias": "none"}


def _frame(adapter: Adapter, rank: int, alpha: float, release: str) -> dict[str, Any]:
    given = {
        name: value for name, value in adapter.config.items() if name not in ("layers_to_transform", "layers_pattern")
    }
    return {
        "task_type": "CAUSAL_LM",
        "modules_to_save": None,
        "bias": "none",
        **given,
        "init_lora_weights": True,  # some other ways to begin cannot build the wrappers of experts
        "lora_dropout": dropout_of(adapter),
        "peft_type": "LORA",
        "peft_version": release,
        "base_model_name_or_path": given.get("base_model_name_or_path") or adapter.base.path,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "exclude_modules": None,
    }


def target_names(adapter: Adapter, names: list[str]) -> list[str]:
    """Last names of the Linear layers where such a name means exactly these, full names elsewhere."""
    mine = set(names)
    found = set()
    for name in mine:
        last = name.rpartition(".")[2]
        others = {other for other in adapter.base.linears if other.rpartition(".")[2] == last}
        found.add(last if others <= mine else name)
    return sorted(found)


def _shortened(parameters: list[str], base: BaseModel) -> list[str]:
    """`mlp.experts.down_proj` instead of a name per layer, where that means exactly these."""
    found: list[str] = []
    for parameter in PARAMETERS:
        names = [name for name in parameters if name.endswith(f".{parameter}")]
        tails = {".".join(name.split(".")[-3:]) for name in names}
        every = [f"{module}.{parameter}" for module in base.specs]
        found += sorted(tails) if len(tails) == 1 and len(names) == len(every) else names
    return found


def is_of_experts(target: str, base: BaseModel) -> bool:
    """Whether a target is a parameter of an experts module."""
    return target.rpartition(".")[0] in base.specs


def _shortened_bare(adapter: Adapter) -> list[str]:
    """`mlp.gate.weight` instead of a name per layer, where that means exactly these."""
    mine, every = adapter.bare, [*adapter.base.bare, *(f"{name}.weight" for name in adapter.base.linears)]
    tails = {name: ".".join(name.split(".")[-3:]) for name in mine}
    exact = {tail for tail in tails.values() if all(n in tails for n in every if n.endswith(f".{tail}") or n == tail)}
    return list(dict.fromkeys(tail if tail in exact else name for name, tail in tails.items()))


def _pattern(values: Mapping[str, float], common: float, base: BaseModel) -> dict[str, Any]:
    """Entries of rank_pattern or alpha_pattern for what differs from the common value."""
    found: dict[str, Any] = {}
    for parameter in PARAMETERS:
        mine = {n: v for n, v in values.items() if n.endswith(f".{parameter}") and is_of_experts(n, base)}
        names = _shortened(list(mine), base)
        if len(set(mine.values())) == 1 and len(names) == 1:
            mine = {names[0]: next(iter(mine.values()))}
        found |= mine
    found |= {name: value for name, value in values.items() if not is_of_experts(name, base)}
    return {
        re.escape(name) + (r"(\.weight)?" if name in base.linears else ""): int(value)
        if float(value).is_integer()
        else value
        for name, value in found.items()
        if not math.isclose(value, common, rel_tol=1e-12)
    }
