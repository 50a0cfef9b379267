"""How releases of PEFT lay out LoRA of fused experts, and which of the layouts an adapter has.

LoRA of a parameter `[experts, p, q]` is lora_A `[experts * rank, x]` and lora_B `[y, rank * experts]`, where x, y are

    layout        PEFT                  parameters               those whose module says is_transposed (gpt-oss)
    peft-0.18     up to 0.18            p, q                     p, q
    peft-0.19.0   0.18.2.dev0, 0.19.0   p, q                     q, p
    peft-0.19     0.19.1 and later      q, p                     p, q

Most families keep `[experts, out, in]`: where x is p, lora_A has the outputs' width and makes the output, so that the
two factors have exchanged roles. transformers can patch PEFT 0.19.0 into the last row, so its number tells no layout.
Widths tell it unless they are equal; then `peft_version` does, or the layout that we write beside the adapters we save.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kt_sft.errors import FormatError

if TYPE_CHECKING:
    from kt_sft.models.layout import ExpertsSpec

OLD, BETWEEN, NEW = LAYOUTS = ("peft-0.18", "peft-0.19.0", "peft-0.19")
MARK = "layout"  # key in kt_sft.json
# Families that keep [experts, in, out] in a module without the attribute by which PEFT would know.
_UNANNOUNCED = ("llama4",)

Widths = Mapping[str, tuple[int, int]]  # parameter -> columns of lora_A, rows of lora_B


class Layout(NamedTuple):
    """A layout, and for each parameter whether lora_A is the factor that makes the output."""

    name: str
    exchanged: dict[str, bool]


def of_release(version: Any) -> tuple[str, ...]:
    """The layouts that a release of PEFT may have written; none if the version says nothing.

    Args:
        version: `peft_version`, as `0.18.1`, `0.19.0.dev0` or `0.18.2.dev0@<commit>`.
    """
    found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?(.*)", str(version or "").strip(), re.DOTALL)
    if found is None:
        return ()
    release, rest = tuple(int(part or 0) for part in found.groups()[:3]), found[4]
    if release < (0, 19):
        return (OLD, BETWEEN) if release == (0, 18, 2) and rest.startswith(".dev") else (OLD,)
    return (BETWEEN, NEW) if release == (0, 19, 0) and not rest else (NEW,)


def form_of(version: str) -> str:
    """Which of the two forms that are written here a release that runs reads."""
    return next((name for name in of_release(version) if name != BETWEEN), NEW)


def exchanges(layout: str, spec: ExpertsSpec, model_type: str) -> bool:
    """Whether lora_A has the width of the outputs in a layout."""
    is_announced = spec.is_transposed and not str(model_type).startswith(_UNANNOUNCED)
    is_p_first = {OLD: True, BETWEEN: not is_announced, NEW: is_announced}[layout]
    return is_p_first != spec.is_transposed


def matrix_shape(spec: ExpertsSpec, parameter: str) -> tuple[int, int]:
    """`(out, in)` of one expert's matrix, of a parameter given by its last name or its full one."""
    is_gate_up = parameter.rpartition(".")[2] == "gate_up_proj"
    return (2 * spec.inter, spec.hidden) if is_gate_up else (spec.hidden, spec.inter)


def decide(
    widths: Widths,
    specs: Mapping[str, ExpertsSpec],
    model_type: str,
    config: Mapping[str, Any],
    beside: Mapping[str, Any],
    path: Path,
) -> Layout:
    """The layout of an adapter: `peft_version`, then our mark, then the widths.

    Where the widths fit no layout at all, the one that is stated is returned, and they are the caller's to refuse.

    Args:
        widths: of each parameter of the experts that the adapter has.
        specs: by experts module.
        config: adapter_config.json.
        beside: kt_sft.json.
        path: the file, for messages.
    Raises:
        FormatError: widths that contradict what is stated, or nothing that tells the layout.
    """

    def layout(name: str) -> Layout:
        return Layout(name, {p: exchanges(name, specs[p.rpartition(".")[0]], model_type) for p in widths})

    every = [layout(name) for name in LAYOUTS]
    fitting = [one for one in every if all(_expected(one, p, specs) == found for p, found in widths.items())]
    stated, by = _stated(config, beside)
    if not fitting:
        return layout(stated[0] if stated else OLD)
    left = [one for one in fitting if one.name in (stated or (OLD, NEW))] or ([] if stated else fitting)
    if not left:
        first = next(p for p, found in widths.items() if _expected(layout(stated[0]), p, specs) != found)
        raise FormatError(
            path,
            f"LoRA of {first}: width of lora_A",
            expected=f"{_expected(layout(stated[0]), first, specs)[0]}, as {by} has it",
            found=f"{widths[first][0]}, as in the layout {fitting[0].name}",
            remedy="state the release that wrote it as peft_version in adapter_config.json",
        )
    if any(one.exchanged != left[0].exchanged for one in left):
        raise FormatError(
            path,
            "layout of the LoRA of fused experts",
            expected=f"peft_version in adapter_config.json, or {MARK} in kt_sft.json",
            found=f"{by or 'neither'}, and square matrices, which fit {' and '.join(one.name for one in left)}",
            remedy="state the release that wrote it as peft_version",
        )
    return left[0]


def _expected(layout: Layout, parameter: str, specs: Mapping[str, ExpertsSpec]) -> tuple[int, int]:
    out, into = matrix_shape(specs[parameter.rpartition(".")[0]], parameter)
    return (out, into) if layout.exchanged[parameter] else (into, out)


def _stated(config: Mapping[str, Any], beside: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """What the adapter's files say, and in which words; a version that leaves it open gives way to the mark."""
    version, mark = config.get("peft_version"), beside.get(MARK)
    released = of_release(version)
    if mark in (released or LAYOUTS) and len(released) != 1:
        return (mark,), f"{MARK} {mark} in kt_sft.json"
    return released, f"peft_version {version} in adapter_config.json" if released else ""
