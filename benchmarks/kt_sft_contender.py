"""kt_sft's routed experts as contenders of the layer benchmarks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from benchmarks.problem import LORA_SCALE, Batch, Layer
from kt_sft.models.spec import ExpertsSpec
from kt_sft.nn.expert_lora import ExpertLora, LoraFactor, LoraPair
from kt_sft.nn.routed_experts import Matrices, RoutedExperts

# PEFT keeps one factor as [experts * rank, dim] and the other as [dim, rank * experts].
LAYOUTS = ("expert_minor", "expert_major", "expert_minor", "expert_major")
GROUP_SIZE = 32  # of int4


class OurLayer:
    """Routed experts with LoRA in the layout of stock PEFT's `target_parameters`.

    Args:
        rows: activations; int8: W8A8 or W4A8.
        experts: gate, up and down of every expert in the types of `weight_format`, block types of GGUF files; without
            them those of the layer.
    """

    def __init__(
        self,
        layer: Layer,
        *,
        weight_format: str | tuple[str, str, str] = "bf16",
        experts: Iterable[Matrices] | None = None,
        rows: str = "bf16",
        chunk_size: int = 1024,
        cpu_activation: str = "retain",
    ) -> None:
        shape = layer.shape
        self._settings = {
            "formats": weight_format,
            "group_size": GROUP_SIZE,
            "chunk_size": chunk_size,
            "cpu_activation": cpu_activation,
        }
        spec = ExpertsSpec(shape.num_experts, shape.hidden, shape.inter, "silu")
        self.experts = RoutedExperts(spec, expert_activations=rows, **self._settings)
        own = ((*gate_up.chunk(2), down) for gate_up, down in zip(layer.gate_up, layer.down, strict=True))
        for index, matrices in enumerate(own if experts is None else experts):
            self.experts.load_expert(index, *matrices)
        self._bind_lora(layer)

    def sharing(self, layer: Layer, *, rows: str | None = None) -> OurLayer:
        """The same packed weights with another LoRA, or with other activations."""
        twin = object.__new__(OurLayer)
        twin._settings = self._settings
        activations = rows or self.experts.expert_activations
        twin.experts = RoutedExperts(self.experts.spec, expert_activations=activations, **self._settings)
        twin.experts.store, twin.experts.layer = self.experts.store, self.experts.layer
        twin._bind_lora(layer)
        return twin

    @property
    def weight_bytes(self) -> float:
        """Packed bytes per weight of the layer."""
        shape = self.experts.spec
        return self.experts.packed_bytes / (3 * shape.num_experts * shape.hidden * shape.inter)

    def _bind_lora(self, layer: Layer) -> None:
        if layer.lora is None:
            self._factors = []
            return
        tensors, experts = layer.lora.tensors(), layer.shape.num_experts
        self._factors = [
            LoraFactor(torch.nn.Parameter(_to_layout(one.detach(), layout)), layout, experts)
            for one, layout in zip(tensors, LAYOUTS, strict=True)
        ]
        for factor, one in zip(self._factors, tensors, strict=True):
            if not torch.equal(factor.canonical(), one):
                raise RuntimeError(
                    f"LoraFactor {factor.layout}: canonical() does not restore [experts, rank, dim]; "
                    "bring benchmarks/kt_sft_contender.py in line with kt_sft/nn/expert_lora.py"
                )
        gate_up_a, gate_up_b, down_a, down_b = self._factors
        self.experts.lora = ExpertLora(
            gate_up=LoraPair(a=gate_up_a, b=gate_up_b, scaling=lambda: LORA_SCALE),
            down=LoraPair(a=down_a, b=down_b, scaling=lambda: LORA_SCALE),
            dropout=0.0,
            active=lambda: True,
        )

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return self.experts(x, topk_ids, topk_weights)

    def input_of(self, batch: Batch) -> Tensor:
        return batch.x

    def lora_leaves(self) -> list[Tensor]:
        return [factor.parameter for factor in self._factors]

    def canonical(self, gradients: list[Tensor]) -> list[Tensor]:
        """Gradients of `lora_leaves()` in the order and layout of `Lora`."""
        return [
            LoraFactor(torch.nn.Parameter(gradient), factor.layout, factor.num_experts).canonical().detach()
            for factor, gradient in zip(self._factors, gradients, strict=True)
        ]


def _to_layout(factor: Tensor, layout: str) -> Tensor:
    """[experts, rank, dim] as PEFT has it: expert_major [experts * rank, dim], expert_minor [dim, rank * experts]."""
    return (factor.flatten(0, 1) if layout == "expert_major" else factor.permute(2, 1, 0).flatten(1)).contiguous()
