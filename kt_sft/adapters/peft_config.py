"""adapter_config.json of PEFT: reading ranks and scales off it, and writing one that fits an adapter."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kt_sft.adapters import layout
from kt_sft.adapters.model import Adapter, BaseModel
from kt_sft.adapters.tensor_file import CONFIG_NAME
from kt_sft.errors import FormatError

SIDE_FILE = "kt_sft.json"
_WITHOUT = "restore the file or delete it (dropout is then 0)"
PARAMETERS = ("gate_up_proj", "down_proj")
# PEFT 0.19 takes target_modules that end so for the matrices of experts, dense and shared MLPs included; as
# target_parameters they are left alone, and their tensors are the same.
_TAKEN_FOR_EXPERTS = (".gate_proj", ".up_proj", ".down_proj", ".w1", ".w2", ".w3")
# Ways to begin that move a part of the weights into the factors: such an adapter belongs to what was left of them.
RESIDUAL = ("pissa", "olora", "corda", "loftq")
_UNSUPPORTED = ("fan_in_fan_out", "use_qalora", "layer_replication", "alora_invocation_tokens", "arrow_config")


def read_config(folder: Path) -> dict[str, Any]:
    """Values of adapter_config.json.

    Raises:
        FormatError: missing, no JSON object, not LoRA, or a kind of LoRA that has no other form.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FormatError(folder, f"no {CONFIG_NAME} in it", remedy="name the directory that save_pretrained wrote")
    values = read_object(path)
    if values.get("peft_type") != "LORA":
        raise FormatError(path, "peft_type", expected="LORA", found=values.get("peft_type"))
    for name in _UNSUPPORTED:
        if values.get(name):
            raise FormatError(path, name, expected="plain LoRA", found=values[name], remedy="it has no other form")
    begun = values.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(RESIDUAL):
        raise FormatError(
            path,
            "init_lora_weights",
            expected="LoRA of the base model's own weights",
            found=f"{begun!r}, LoRA of what it left of them",
            remedy="save it with PEFT's path_initial_model_for_weight_conversion",
        )
    _check_number(path, "r", values.get("r"), is_whole=True)
    _check_number(path, "lora_alpha", values.get("lora_alpha"))
    for name in ("rank_pattern", "alpha_pattern"):
        _check_pattern(path, name, values.get(name) or {})
    parameters = values.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(entry, str) for entry in parameters):
        raise FormatError(path, "target_parameters", expected="a list of names", found=repr(parameters)[:80])
    return values


def _check_number(path: Path, name: str, value: Any, *, is_whole: bool = False) -> None:
    """Zero would be an adapter that does nothing, and is something else to llama.cpp: its scale is then 1."""
    kinds = int if is_whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):
        raise FormatError(path, name, expected="a positive number", found=repr(value)[:80])


def _check_pattern(path: Path, name: str, patterns: Any) -> None:
    if not isinstance(patterns, dict):
        raise FormatError(path, name, expected="an object", found=type(patterns).__name__)
    for pattern, value in patterns.items():
        try:
            re.compile(_whole_name(pattern))
        except re.error as error:
            what = f"{name}, key {pattern[:80]!r}"
            raise FormatError(path, what, expected="a regular expression", found=str(error)) from None
        _check_number(path, f"{name}, {pattern[:80]!r}", value, is_whole=name == "rank_pattern")


def read_side_file(folder: Path) -> dict[str, Any]:
    """Values of kt_sft.json; empty where there is none.

    Raises:
        FormatError: no JSON object, or values that it cannot have.
    """
    path = folder / SIDE_FILE
    try:
        values = read_object(path) if path.is_file() else {}
        if not 0.0 <= float(values.get("lora_dropout", 0.0)) < 1.0:
            raise ValueError("expected an object with 0 <= lora_dropout < 1")
        if values.get(layout.MARK) not in (None, *layout.LAYOUTS):
            raise ValueError(
                f"{layout.MARK}: expected one of {', '.join(layout.LAYOUTS)}, found {values[layout.MARK]!r}"
            )
    except FormatError as error:
        raise FormatError(path, "content", found=str(error), remedy=_WITHOUT) from None
    except (ValueError, TypeError) as error:
        raise FormatError(path, str(error), remedy=_WITHOUT) from None
    return values


def read_object(path: Path) -> dict[str, Any]:
    """Values of a JSON file.

    Raises:
        FormatError: no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(path, "damaged", expected="JSON", found=str(error)[:120]) from None
    if not isinstance(values, dict):
        raise FormatError(path, "content", expected="a JSON object", found=type(values).__name__)
    return values


def rank_of(config: Mapping[str, Any], target: str) -> int:
    """What PEFT takes for the rank of a module or parameter."""
    return int(_by_pattern(config.get("rank_pattern"), target, config["r"]))


def scale_of(config: Mapping[str, Any], target: str, rank: int) -> float:
    """What PEFT multiplies b a with."""
    alpha = float(_by_pattern(config.get("alpha_pattern"), target, config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def has_pattern(patterns: Mapping[str, Any] | None, target: str) -> bool:
    """Whether a rank_pattern or alpha_pattern has a key for a module or parameter."""
    return any(re.match(_whole_name(pattern), target) for pattern in patterns or {})


def dropout_of(adapter: Adapter) -> float:
    """The dropout that an adapter was trained with, wherever its files keep it."""
    return float(adapter.beside.get("lora_dropout", adapter.config.get("lora_dropout") or 0.0))


def _by_pattern(patterns: Mapping[str, Any] | None, target: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(_whole_name(pattern), target):
            return value
    return default


def _whole_name(pattern: str) -> str:
    """What PEFT makes of a key of a pattern."""
    return rf"(.*\.)?({pattern})$"


def named_parameters(config: Mapping[str, Any], module: str) -> list[str]:
    """Which of an experts module's parameters `target_parameters` names, in the order in which PEFT nests wrappers."""
    entries = config.get("target_parameters") or []
    names = [f"{module}.{parameter}" for parameter in PARAMETERS]
    return [n for n in names if any(n == entry or n.endswith(f".{entry}") for entry in entries)]


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
