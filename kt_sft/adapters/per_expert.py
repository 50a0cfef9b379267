"""One pair per expert and projection, as vLLM and SGLang read adapters of mixture-of-experts models.

    base_model.model.<key of the checkpoint without .weight>.lora_A.weight  [rank, in]
    base_model.model.<key of the checkpoint without .weight>.lora_B.weight  [out, rank]

Both name an expert's matrix as the checkpoint does (`mlp.experts.0.gate_proj`, Mixtral:
`block_sparse_moe.experts.0.w1`), want every projection of every expert, and read one rank and one alpha for the whole
adapter. SGLang copies factors into buffers of exactly that rank. Families whose checkpoints hold fused experts have no
such names: for them vLLM reads the layout of PEFT 0.19. PEFT itself can leave experts out and give each a rank and an
alpha of its own: such are read, and written as all experts at the highest rank.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_sft.adapters import fused, peft_config
from kt_sft.adapters.model import INCOMPLETE, Adapter, BaseModel, Lora
from kt_sft.adapters.plain import LinearReader, linear_tensors
from kt_sft.adapters.tensor_file import PREFIX, TensorFile
from kt_sft.errors import FormatError, UnsupportedModel
from kt_sft.models.expert_keys import PROJECTIONS

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_ALIASES = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down",
    "gate": "gate", "up": "up", "down": "down",
}  # fmt: skip
PER_EXPERT = re.compile(r"(?P<module>.+)\.(?P<expert>[0-9]{1,9})\.(?P<child>\w+)\.lora_(?P<role>[AB])\.weight")


def read(folder: Path, tensors: TensorFile, config: Mapping[str, Any], base: BaseModel) -> Adapter:
    """Open an adapter with a pair per expert; experts that it leaves alone are zeros.

    Raises:
        FormatError: half a pair is missing, a shape does not fit, or a name is not of the model.
    """
    stems = _stems(tensors, base)
    known = {f"{stem}.lora_{role}.weight" for stem in stems.values() for role in "AB"}
    linear = LinearReader(tensors, config, base, known, left_out=None)  # its configs name more than it holds
    ranks, scales = dict(linear.ranks), dict(linear.scales)
    for module, spec in base.specs.items():
        for projection in PROJECTIONS:
            mine = [stems[module, projection, e] for e in range(spec.num_experts) if (module, projection, e) in stems]
            if not mine:
                continue
            found = [_check_pair(tensors, stem, config, base.expert_shape(module, projection)) for stem in mine]
            target = f"{module}.{projection}"
            ranks[target], scales[target] = max(found), peft_config.scale_of(config, mine[0], found[0])
            if len(mine) < spec.num_experts:
                logger.info("%s: %d of %d experts have LoRA", target, len(mine), spec.num_experts)

    def experts(module: str) -> dict[str, Lora]:
        found: dict[str, Lora] = {}
        for projection in PROJECTIONS:
            target = f"{module}.{projection}"
            if target in ranks:
                mine = [stems.get((module, projection, e)) for e in range(base.specs[module].num_experts)]
                found[projection] = _stacked(tensors, mine, config, ranks[target], scales[target])
        return found

    whole = linear.whole()
    return Adapter(
        folder, "per-expert", base, config, ranks, scales, linear, experts, whole=whole, extras=linear.extras
    )


def _stems(tensors: TensorFile, base: BaseModel) -> dict[tuple[str, str, int], str]:
    """Name without `.lora_A.weight` by module, projection and expert."""
    by_key = {
        key.removesuffix(".weight"): (module, projection, expert)
        for module, layer in base.layers.items()
        for (projection, expert), key in layer.single.items()
    }
    found: dict[tuple[str, str, int], str] = {}
    for name in tensors:
        match = PER_EXPERT.fullmatch(name)
        if match is None:
            continue
        stem = f"{match['module']}.{match['expert']}.{match['child']}"
        place = by_key.get(stem)
        if place is None and match["module"] in base.specs and match["child"] in _ALIASES:
            place = (match["module"], _ALIASES[match["child"]], int(match["expert"]))
            if place[2] >= base.specs[place[0]].num_experts:
                expected = f"{base.specs[place[0]].num_experts} experts"
                raise FormatError(tensors.path, f"tensor {name}", expected=expected, found=f"expert {place[2]}")
        if place is not None:
            if found.setdefault(place, stem) != stem:
                what, found_too = f"tensor {name}", f"one of {found[place]}, too, which is the same matrix"
                raise FormatError(tensors.path, what, expected="one pair of a matrix", found=found_too)
    return found


def _check_pair(tensors: TensorFile, stem: str, config: Mapping[str, Any], shape: tuple[int, int]) -> int:
    """The rank of one expert's pair, which adapter_config.json says, too."""
    out, into = shape
    rank = peft_config.rank_of(config, stem)
    for role, expected in (("A", (rank, into)), ("B", (out, rank))):
        key = f"{stem}.lora_{role}.weight"
        if key not in tensors:
            raise FormatError(tensors.path, f"tensor {key}", expected="present", found="missing", remedy=INCOMPLETE)
        found = tensors.shape(key)
        if found != expected:
            raise FormatError(tensors.path, f"tensor {key}", expected=list(expected), found=list(found))
    return rank


def _stacked(tensors: TensorFile, stems: list[str | None], config: Mapping[str, Any], rank: int, scale: float) -> Lora:
    """All experts at one rank and one scale: padded with zeros, the difference of scales in b."""
    import torch

    pairs: list[tuple[Tensor, Tensor] | None] = []
    for stem in stems:
        if stem is None:
            pairs.append(None)
            continue
        a, b = (tensors.read(f"{stem}.lora_{role}.weight") for role in "AB")
        own = peft_config.rank_of(config, stem)
        one = Lora(a, b, peft_config.scale_of(config, stem, own)).fitted(rank, scale)
        pairs.append((one.a, one.b))
    some = next(pair for pair in pairs if pair is not None)
    zeros = (torch.zeros_like(some[0]), torch.zeros_like(some[1]))
    dtypes = [[pair[i].dtype for pair in pairs if pair is not None] for i in (0, 1)]
    common = [torch.float32 if len(set(found)) > 1 else found[0] for found in dtypes]
    a, b = (torch.stack([(pair or zeros)[i].to(common[i]) for pair in pairs]) for i in (0, 1))
    return Lora(a, b, scale)


def write(adapter: Adapter, form: str) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """adapter_config.json and the tensors for vLLM or SGLang.

    Raises:
        UnsupportedModel: the engine has no such form for this family.
    """
    base = adapter.base
    if adapter.experts and not all(base.layers[module].single for module in adapter.experts):
        if form == "vllm":
            return fused.write(_completed(adapter), "peft-0.19", is_uniform=True)
        raise UnsupportedModel(
            f"--to {form}",
            expected="a family whose checkpoints have a tensor per expert",
            found=f"{base.model_type}, which stores fused experts",
            remedy="merge the adapter instead",
        )
    rank, scale = peft_config.uniform(adapter)
    targets = set(peft_config.target_names(adapter, adapter.linears))
    if adapter.experts and form == "sglang":
        targets |= {"gate_proj", "up_proj", "down_proj"}  # it renames w1, w3 and w2 to these
    elif adapter.experts:
        keys = base.layers[adapter.experts[0]].single
        targets |= {keys[projection, 0].removesuffix(".weight").rpartition(".")[2] for projection in PROJECTIONS}
    config = peft_config.plain_config(adapter, rank, scale, targets)
    return config, _tensors(adapter, rank, scale)


def _tensors(adapter: Adapter, rank: int, scale: float) -> Iterator[tuple[str, Tensor]]:
    base = adapter.base
    for module in adapter.experts:
        loras = _complete(adapter.read_experts(module), module, base)
        for expert in range(base.specs[module].num_experts):
            for projection, lora in loras.items():
                stem = PREFIX + base.layers[module].single[projection, expert].removesuffix(".weight")
                one = Lora(lora.a[expert], lora.b[expert], lora.scale).fitted(rank, scale)
                yield f"{stem}.lora_A.weight", one.a
                yield f"{stem}.lora_B.weight", one.b
    names = adapter.linears
    yield from linear_tensors(adapter, dict.fromkeys(names, rank), dict.fromkeys(names, scale), base.hub_names)


def _complete(loras: dict[str, Lora], module: str, base: BaseModel) -> dict[str, Lora]:
    """All three projections; zeros for those that the adapter leaves alone."""
    one = next(iter(loras.values()))
    num_experts, found = base.specs[module].num_experts, {}
    for projection in PROJECTIONS:
        out, into = base.expert_shape(module, projection)
        zeros = Lora(one.a.new_zeros(num_experts, 1, into), one.b.new_zeros(num_experts, out, 1), one.scale)
        found[projection] = loras.get(projection, zeros)
    return found


def _completed(adapter: Adapter) -> Adapter:
    """The same adapter with every projection; vLLM wants gate_up and down of a layer, or neither."""
    from dataclasses import replace

    ranks, scales = dict(adapter.ranks), dict(adapter.scales)
    for module in adapter.experts:
        here = adapter.projections(module)[0]
        for projection in PROJECTIONS:
            ranks.setdefault(f"{module}.{projection}", 1)
            scales.setdefault(f"{module}.{projection}", scales[f"{module}.{here}"])
    return replace(
        adapter,
        ranks=ranks,
        scales=scales,
        read_experts=lambda module: _complete(adapter.read_experts(module), module, adapter.base),
    )
