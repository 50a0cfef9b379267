"""LoRA adapters of llama.cpp: one GGUF file.

    blk.<layer>.ffn_<gate|up|down>_exps.weight.lora_a  [experts, rank, in]
    blk.<layer>.ffn_<gate|up|down>_exps.weight.lora_b  [experts, out, rank]
    blk.<layer>.attn_q.weight.lora_a                   [rank, in], and so on for other matrices

with general.type = adapter, adapter.type = lora and adapter.lora.alpha; the scale of a pair is alpha / rank. Names and
the order of q and k rows of the llama architecture are those of whole models (formats/gguf_names.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_sft.adapters import peft_config
from kt_sft.adapters.model import Adapter, BaseModel, Lora
from kt_sft.adapters.schema import MAX_SCALE, is_number
from kt_sft.adapters.tensor_file import not_finite
from kt_sft.errors import FormatError, UnsupportedModel
from kt_sft.formats.finite import is_finite
from kt_sft.formats.gguf import GgufIndex
from kt_sft.formats.gguf_encode import encode
from kt_sft.formats.gguf_names import ARCHITECTURES, block_name, layer_of, permute, unpermute
from kt_sft.formats.gguf_writer import PlannedGguf
from kt_sft.models.expert_keys import PROJECTIONS

if TYPE_CHECKING:
    from torch import Tensor

BASE_KEY = "kt_sft.base_model"
ALPHA_KEY = "adapter.lora.alpha"
# llama.cpp loads LoRA of these and computes without it: its graph of this architecture multiplies by the bare weights.
_IGNORED = {"deepseek2": ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")}


def check_metadata(index: GgufIndex) -> float:
    """The adapter's alpha.

    Raises:
        FormatError: the file is a model, or an adapter of another kind.
    """
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        if (found := index.text(key)) != expected:
            found = repr(found or ("a model" if key == "general.type" else None))
            raise FormatError(index.source, f"metadata {key}", expected=expected, found=found)
    alpha = index.metadata.get(ALPHA_KEY)
    if not is_number(alpha) or not abs(alpha) <= MAX_SCALE:
        expected = f"a number up to {MAX_SCALE}"
        raise FormatError(index.source, f"metadata {ALPHA_KEY}", expected=expected, found=repr(alpha)[:80])
    return float(alpha)


def read(file: Path, base: BaseModel) -> Adapter:
    """Open a GGUF adapter.

    Raises:
        FormatError: another architecture, half a pair, another shape, or a name that the model has not.
        UnsupportedModel: the family has no names in GGUF files here.
    """
    index = GgufIndex.from_path(file)
    alpha = check_metadata(index)
    architecture = _architecture(base)
    if (found := index.text("general.architecture")) != architecture:
        raise FormatError(file, "metadata general.architecture", expected=architecture, found=repr(found))
    targets = _names(base)
    ranks: dict[str, int] = {}
    stems: dict[str, str] = {}
    for name in index:
        stem = name.removesuffix(".lora_a").removesuffix(".lora_b")
        if stem == name or stem not in targets:
            expected = "lora_a or lora_b of a matrix of the model"
            raise FormatError(file, f"tensor {name}", expected=expected, found="another name")
        target, shape = targets[stem]
        stems[target] = stem
    for target, stem in stems.items():
        ranks[target] = _check_pair(index, stem, targets[stem][1])
    scales = {target: (alpha / rank if alpha else 1.0) for target, rank in ranks.items()}
    turn = _row_order(base, unpermute)

    def linear(name: str) -> Lora:
        a, b = _factors(index, stems[name])
        return Lora(a, turn(name)(b), scales[name])

    def experts(module: str) -> dict[str, Lora]:
        mine = [p for p in PROJECTIONS if f"{module}.{p}" in stems]
        return {p: Lora(*_factors(index, stems[f"{module}.{p}"]), scales[f"{module}.{p}"]) for p in mine}

    rank = max(ranks.values(), default=1)
    config: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "base_model_name_or_path": base.path}
    return Adapter(file, "gguf", base, config, ranks, scales, linear, experts)


def check_finite(file: Path) -> None:
    """Look at every number of a GGUF adapter.

    Raises:
        FormatError: names the first tensor with NaN or infinity.
    """
    index = GgufIndex.from_path(file)
    bad = [name for name in index if not is_finite(index.read(name))]
    if bad:
        raise not_finite(file, bad[0], len(bad) - 1)


def write(adapter: Adapter) -> tuple[dict[str, Any], list[PlannedGguf], Iterator[Iterator[Tensor]]]:
    """Metadata, plan and data of the file, all factors in f32.

    Raises:
        UnsupportedModel: the family is not known, or a matrix has no name there.
    """
    base = adapter.base
    metadata: dict[str, Any] = {
        "general.architecture": _architecture(base),
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.name": adapter.source.stem,
    }
    stems = {target: stem for stem, (target, _) in _names(base).items()}
    for name in adapter.linears:
        if name not in stems or name.rpartition(".")[2] in _IGNORED.get(_architecture(base), ()):
            raise UnsupportedModel(
                "--to gguf",
                expected="LoRA on matrices to which llama.cpp applies it",
                found=name,
                remedy="merge the adapter into a GGUF model instead, or train it without that matrix",
            )
    rank, scale = peft_config.uniform(adapter)
    # alpha is one for the file and its use divides by each pair's own rank: what differs goes into lora_b.
    alpha = rank * scale
    metadata[ALPHA_KEY] = float(alpha)
    if base.path:
        metadata[BASE_KEY] = base.path
    plan, data = [], []
    for module in adapter.experts:
        num_experts = base.specs[module].num_experts
        for projection in adapter.projections(module):
            target = f"{module}.{projection}"
            shape = base.expert_shape(module, projection)
            plan += _planned(stems[target], (num_experts,), adapter.ranks[target], shape)
            data += [(adapter.read_experts, module, projection, role) for role in "ab"]
    for name in adapter.linears:
        plan += _planned(stems[name], (), adapter.ranks[name], base.linears[name])
        data += [(adapter.read_linear, name, None, role) for role in "ab"]
    return metadata, plan, _data(data, alpha, base)


def _planned(stem: str, lead: tuple[int, ...], rank: int, shape: tuple[int, int]) -> list[PlannedGguf]:
    out, into = shape
    return [
        PlannedGguf(f"{stem}.lora_a", "F32", (*lead, rank, into)),
        PlannedGguf(f"{stem}.lora_b", "F32", (*lead, out, rank)),
    ]


def _data(entries: list[tuple[Any, str, str | None, str]], alpha: float, base: BaseModel) -> Iterator[Iterator[Tensor]]:
    turn = _row_order(base, permute)
    last: tuple[str, Any] | None = None
    for read_one, name, projection, role in entries:
        if last is None or last[0] != name:
            last = (name, read_one(name))
        lora = last[1] if projection is None else last[1][projection]
        if role == "a":
            yield iter([encode(lora.a, "F32")])
            continue
        fitted = lora.fitted(lora.rank, alpha / lora.rank)
        yield iter([encode(fitted.b if projection else turn(name)(fitted.b), "F32")])


def _architecture(base: BaseModel) -> str:
    if base.model_type not in ARCHITECTURES:
        raise UnsupportedModel(
            "GGUF adapter", expected=f"one of {', '.join(ARCHITECTURES)}", found=f"model type {base.model_type}"
        )
    return ARCHITECTURES[base.model_type]


def _names(base: BaseModel) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor of the model's GGUF file -> our target and the shape of the matrix, or matrices."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for module, spec in base.specs.items():
        for projection in PROJECTIONS:
            stem = f"blk.{layer_of(module)}.ffn_{projection}_exps.weight"
            found[stem] = (f"{module}.{projection}", (spec.num_experts, *base.expert_shape(module, projection)))
    for name, shape in base.linears.items():
        stem = block_name(f"{name}.weight")
        if stem is not None:
            found[stem] = (name, shape)
    return found


def _check_pair(index: GgufIndex, stem: str, shape: tuple[int, ...]) -> int:
    *lead, out, into = shape
    found = index.info(f"{stem}.lora_a").shape if f"{stem}.lora_a" in index else ()
    rank = found[-2] if len(found) == len(shape) else 0
    for role, expected in (("a", (*lead, rank or "rank", into)), ("b", (*lead, out, rank or "rank"))):
        name = f"{stem}.lora_{role}"
        if name not in index or index.info(name).shape != expected:
            shown = list(index.info(name).shape) if name in index else "missing"
            raise FormatError(index.source, f"tensor {name}", expected=list(expected), found=shown)
        index.expect_numbers(name)
    return rank


def _factors(index: GgufIndex, stem: str) -> tuple[Tensor, Tensor]:
    return index.read(f"{stem}.lora_a"), index.read(f"{stem}.lora_b")


def _row_order(base: BaseModel, order: Callable[[int], Callable]) -> Callable[[str], Callable[[Tensor], Tensor]]:
    """For each Linear, how its rows go from one order to the other."""

    def turn(name: str) -> Callable[[Tensor], Tensor]:
        key = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.rpartition(".")[2])
        if key is None or ARCHITECTURES[base.model_type] != "llama":
            return lambda b: b
        return order(base.config.get(key) or base.config["num_attention_heads"])

    return turn
