"""Adapters of KTransformers: PEFT's file for all but the routed experts, whose LoRA lies beside it.

fused_expert_lora.safetensors: `layers.<L>.experts.<gate|up|down>_lora_a` `[experts, rank, in]`, `_lora_b`
`[experts, out, rank]`. The scale is lora_alpha / rank, rank being that of the tensors, whatever adapter_config.json
says of other modules. kt_adapter_manifest.json, which some releases write, repeats rank and alpha.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kt_sft.adapters import peft_config
from kt_sft.adapters.model import INCOMPLETE, OTHER_MODEL, Adapter, BaseModel, Lora
from kt_sft.adapters.plain import LinearReader
from kt_sft.adapters.tensor_file import TensorFile
from kt_sft.errors import FormatError
from kt_sft.formats.file_names import ADAPTER_CONFIG
from kt_sft.formats.json_object import read_object
from kt_sft.models.expert_keys import PROJECTIONS

logger = logging.getLogger(__name__)

FORM = "ktransformers"
MANIFEST_NAME = "kt_adapter_manifest.json"
_KEY = re.compile(
    r"(?P<before>(?:.*\.)?)layers\.(?P<layer>[0-9]{1,9})\.(?P<inside>(?:\w+\.)*)experts\."
    r"(?P<projection>gate|up|down)_lora_(?P<role>[ab])(?:\.weight)?"
)
# In target_modules they may mean the experts alone.
_EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def read(folder: Path, tensors: TensorFile, beside: TensorFile, config: Mapping[str, Any], base: BaseModel) -> Adapter:
    """Open an adapter of KTransformers.

    Args:
        tensors: PEFT's file, which may have none.
        beside: the experts' file.
    Raises:
        FormatError: names that are not of the form, half a pair, another shape, a layer without routed experts, or
            what contradicts the config or the manifest.
    """
    linear = LinearReader(tensors, config, base, set(), left_out=_EXPERT_NAMES)
    whole = linear.whole()
    keys = _keys(beside, base)
    alpha = float(config["lora_alpha"])
    ranks, scales = dict(linear.ranks), dict(linear.scales)
    for module in base.specs:
        for projection in PROJECTIONS:
            pair = {role: keys[module, projection, role] for role in "ab" if (module, projection, role) in keys}
            if not pair:
                continue
            target = f"{module}.{projection}"
            ranks[target] = _check_pair(beside, pair, base, module, projection)
            scales[target] = alpha / ranks[target]
    _check_stated(folder, beside, config, base, {t: ranks[t] for t in ranks if t not in linear.ranks})

    def experts(module: str) -> dict[str, Lora]:
        found = {}
        for projection in (p for p in PROJECTIONS if (module, p, "a") in keys):
            a, b = (beside.read(keys[module, projection, role]) for role in "ab")
            found[projection] = Lora(a, b, scales[f"{module}.{projection}"])
        return found

    return Adapter(folder, FORM, base, config, ranks, scales, linear, experts, whole=whole, extras=linear.extras)


def _keys(beside: TensorFile, base: BaseModel) -> dict[tuple[str, str, str], str]:
    """Key of each factor by experts module, projection and role."""
    groups: dict[tuple[str, str, str], list[re.Match[str]]] = {}
    for key in beside:
        match = _KEY.fullmatch(key)
        if match is None:
            expected = "layers.<number>.experts.<gate, up or down>_lora_<a or b>"
            raise FormatError(beside.path, f"tensor {key}", expected=expected, found="another name")
        groups.setdefault((match["before"], match["layer"], match["inside"]), []).append(match)
    found: dict[tuple[str, str, str], str] = {}
    for group in groups.values():
        module = _module(beside, group, base)
        for match in group:
            place = (module, match["projection"], match["role"])
            if place in found:
                expected, twice = f"one such factor of {module}", f"{found[place]}, too"
                raise FormatError(beside.path, f"tensor {match[0]}", expected=expected, found=twice)
            found[place] = match[0]
    return found


def _module(beside: TensorFile, group: list[re.Match[str]], base: BaseModel) -> str:
    """The experts module of some keys: by the number of the layer, then by what else they say, then by shapes."""
    one = group[0]
    modules = [name for name in base.specs if layer_of(name) == int(one["layer"])]
    inner = f".{one['inside']}experts"
    hints = (
        lambda name: f".{one['before']}layers." in f".{name}" and f".{name}".endswith(inner),
        lambda name: f".{name}".endswith(inner),
        lambda name: all(_fits(beside.shape(m[0]), base, name, m["projection"], m["role"]) for m in group),
    )
    for hint in hints:
        modules = [name for name in modules if hint(name)] or modules
    if len(modules) == 1:
        return modules[0]
    expected, found = f"routed experts in layer {one['layer']}", " and ".join(modules) or "none there"
    raise FormatError(beside.path, f"tensor {one[0]}", expected=expected, found=found, remedy=OTHER_MODEL)


def layer_of(module: str) -> int | None:
    """The number of the layer that an experts module is in; None if its name has none."""
    found = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", module) or re.search(r"\.(\d+)(?:\.|$)", module)
    return int(found[1]) if found else None


def _fits(shape: tuple[int, ...], base: BaseModel, module: str, projection: str, role: str) -> bool:
    out, into = base.expert_shape(module, projection)
    wanted = {0: base.specs[module].num_experts} | ({2: into} if role == "a" else {1: out})
    return len(shape) == 3 and all(shape[axis] == size for axis, size in wanted.items())


def _check_pair(beside: TensorFile, pair: Mapping[str, str], base: BaseModel, module: str, projection: str) -> int:
    """The rank that both factors have."""
    if len(pair) != 2:
        there = next(iter(pair.values()))
        missing = f"{there[: there.rindex('_lora_')]}_lora_{'b' if 'a' in pair else 'a'}"
        raise FormatError(beside.path, f"tensor {missing}", expected="present", found="missing", remedy=INCOMPLETE)
    num_experts, (out, into) = base.specs[module].num_experts, base.expert_shape(module, projection)
    shape = beside.shape(pair["a"])
    rank: Any = shape[1] if len(shape) == 3 and shape[1] else "rank"
    for role, expected in (("a", (num_experts, rank, into)), ("b", (num_experts, out, rank))):
        found = beside.shape(pair[role])
        if found != expected:
            shown = f"[{', '.join(map(str, expected))}]"
            what = f"tensor {pair[role]}"
            raise FormatError(beside.path, what, expected=shown, found=list(found), remedy=OTHER_MODEL)
    return rank


def _check_stated(
    folder: Path, beside: TensorFile, config: Mapping[str, Any], base: BaseModel, ranks: Mapping[str, int]
) -> None:
    """What adapter_config.json and the manifest say of rank and alpha against the tensors."""
    for name in ("rank_pattern", "alpha_pattern"):
        for target in ranks:
            module, _, projection = target.rpartition(".")
            spelled = (module, f"{module}.0.{projection}_proj", f"{module}.{projection}_proj", f"{module}.gate_up_proj")
            named = [s for s in spelled if peft_config.has_pattern(config.get(name), s)]
            if named:
                expected = "nothing about routed experts, whose scale here is lora_alpha over the tensors' rank"
                raise FormatError(folder / ADAPTER_CONFIG, name, expected=expected, found=f"a key for {named[0]}")
    if not (folder / MANIFEST_NAME).is_file():
        if any(rank != config["r"] for rank in ranks.values()):
            logger.info("%s: experts' LoRA has a rank of its own; its scale is lora_alpha over that rank", beside.path)
        return
    manifest = read_object(folder / MANIFEST_NAME)
    if manifest.get("status", "ready") != "ready":
        found, remedy = repr(manifest["status"])[:80], "save or copy the adapter again"
        raise FormatError(folder / MANIFEST_NAME, "status", expected="ready", found=found, remedy=remedy)
    stated = manifest.get("lora") if isinstance(manifest.get("lora"), dict) else {}
    wrong = [rank for rank in ranks.values() if rank != stated.get("rank", rank)]
    if wrong:
        raise FormatError(
            beside.path, "rank", expected=f"{stated['rank']!r:.80}, as {MANIFEST_NAME} says", found=wrong[0]
        )
    if stated.get("alpha", config["lora_alpha"]) != config["lora_alpha"]:
        expected = f"{config['lora_alpha']}, as lora_alpha in adapter_config.json"
        found = f"{stated['alpha']!r:.80}"
        raise FormatError(folder / MANIFEST_NAME, "alpha", expected=expected, found=found)
    _check_sizes(folder, manifest.get("artifacts"))


def _check_sizes(folder: Path, artifacts: Any) -> None:
    """Tensor files that are those of which the manifest was written."""
    for name, record in artifacts.items() if isinstance(artifacts, dict) else ():
        wanted = record.get("size") if isinstance(record, dict) else None
        path = folder / str(name)
        if not str(name).endswith((".safetensors", ".bin")) or not isinstance(wanted, int):
            continue
        found = path.stat().st_size if path.is_file() else "missing"
        if found != wanted:
            remedy = "save or copy the adapter again"
            raise FormatError(path, f"size in {MANIFEST_NAME}", expected=wanted, found=found, remedy=remedy)
