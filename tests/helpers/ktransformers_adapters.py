"""Adapters as KTransformers writes them: PEFT's file for attention, the routed experts' LoRA beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kt_sft.adapters.model import BaseModel
from kt_sft.integrations.transformers.base_model import find_base_model
from tests.helpers import parity, tiny_models

PARTS = ("gate", "up", "down")
NAME = "fused_expert_lora.safetensors"


def make(family: str, root: Path, *, rank: int = 2, prefix: str = "", **overrides) -> tuple[Path, nn.Module]:
    """A base model in `root/base`, an adapter in `root/adapter`, and stock code with both in float64.

    Args:
        rank: of the experts; attention has rank 2 and lora_alpha 4.
        prefix: of the keys in the experts' file.
    """
    base = tiny_models.build(family, root / "base", **overrides)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=r".*\.(q_proj|o_proj)", task_type="CAUSAL_LM")
    stock = get_peft_model(tiny_models.load_stock(base, dtype=torch.float64), config)
    parity.fill_lora(stock).eval().save_pretrained(root / "adapter")
    described = find_base_model(base)
    tensors = factors(described, rank, prefix)
    save_file(tensors, root / "adapter" / NAME)
    add(stock.get_base_model(), described, tensors, alpha=4)
    return root / "adapter", stock


def factors(base: BaseModel, rank: int, prefix: str = "") -> dict[str, Tensor]:
    """A pair for every projection, exact in bf16."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for module, spec in base.specs.items():
        for part in PARTS:
            out, into = base.expert_shape(module, part)
            stem = f"{prefix}layers.{number(module)}.experts.{part}_lora_"
            for role, shape in (("a", (rank, into)), ("b", (out, rank))):
                drawn = torch.randn(spec.num_experts, *shape, generator=generator)
                found[stem + role] = (0.2 * drawn).bfloat16().float()
    return found


def number(module: str) -> str:
    """Of the layer."""
    return module.split("layers.")[1].split(".")[0]


@torch.no_grad()
def add(stock: nn.Module, base: BaseModel, tensors: Mapping[str, Tensor], *, alpha: float) -> None:
    """alpha / rank * b a, in float64, onto the stock model's own parameters."""
    for module, spec in base.specs.items():
        experts = stock.get_submodule(module.removesuffix(".base_layer"))
        deltas = {}
        for part in PARTS:
            out, into = base.expert_shape(module, part)
            deltas[part] = torch.zeros(spec.num_experts, out, into, dtype=torch.float64)
            keys = [k for k in tensors if f"layers.{number(module)}.experts.{part}_lora_" in k]
            if keys:
                a, b = (tensors[key].double() for key in sorted(keys))
                deltas[part] += alpha / a.shape[1] * (b @ a)
        gate_up = torch.empty(spec.num_experts, 2 * spec.inter, spec.hidden, dtype=torch.float64)
        gate_up[:, spec.gate_rows], gate_up[:, spec.up_rows] = deltas["gate"], deltas["up"]
        experts.gate_up_proj += gate_up.mT if spec.is_transposed else gate_up
        experts.down_proj += deltas["down"].mT if spec.is_transposed else deltas["down"]


def change(adapter: Path, edit) -> dict[str, Tensor]:
    """Rewrite the experts' file; returns what is in it now."""
    tensors = {name: t.clone().contiguous() for name, t in edit(load_file(adapter / NAME)).items()}
    save_file(tensors, adapter / NAME)
    return tensors


def without(tensors: dict[str, Tensor], parts: Iterable[str]) -> dict[str, Tensor]:
    """All but the keys that contain one of the parts."""
    return {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}


def manifest(adapter: Path, **values) -> None:
    """Write kt_adapter_manifest.json."""
    (adapter / "kt_adapter_manifest.json").write_text(json.dumps(values))
