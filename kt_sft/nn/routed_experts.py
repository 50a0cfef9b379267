"""The module that takes the place of a transformers experts module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kt_sft.models.spec import ExpertsSpec
from kt_sft.native import native
from kt_sft.nn.expert_lora import ExpertLora
from kt_sft.ops.moe import NO_LORA, MoeCall, moe


class RoutedExperts(nn.Module):
    """All routed experts of one layer, on the CPU, behind transformers' experts interface.

    Args:
        spec: sizes and activation.
        chunk_size: tokens per native pass.
        cpu_activation: `retain` or `recompute` gate and up products in backward.
        dtype: that the placeholders show to PEFT.

    `gate_up_proj` `[num_experts, 2 * inter, hidden]` and `down_proj` `[num_experts, hidden, inter]` are placeholders of one
    element with stride zero: they tell other libraries the shapes, the weights live packed in the native layer.
    """

    def __init__(self, spec: ExpertsSpec, *, chunk_size: int = 1024, cpu_activation: str = "retain", dtype=torch.bfloat16):
        super().__init__()
        self.num_experts = spec.num_experts
        self.hidden_dim = spec.hidden
        self.intermediate_dim = spec.inter
        self.spec = spec
        self.chunk_size = chunk_size
        self.retain = cpu_activation == "retain"
        self.layer = native().MoeLayer(spec.num_experts, spec.hidden, spec.inter, "bf16", spec.activation)
        self.lora: ExpertLora | None = None
        self.gate_up_proj = _placeholder((spec.num_experts, 2 * spec.inter, spec.hidden), dtype)
        self.down_proj = _placeholder((spec.num_experts, spec.hidden, spec.inter), dtype)

    def load_expert(self, index: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Packs gate, up `[inter, hidden]` and down `[hidden, inter]`, bf16; the tensors are free afterwards."""
        self.layer.load_expert(index, gate, up, down)

    def unpack_expert(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies (gate, up, down) of one expert as they were loaded."""
        gate, up = (torch.empty(self.intermediate_dim, self.hidden_dim, dtype=torch.bfloat16) for _ in range(2))
        down = torch.empty(self.hidden_dim, self.intermediate_dim, dtype=torch.bfloat16)
        self.layer.unpack_expert(index, gate, up, down)
        return gate, up, down

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self.layer.packed_bytes

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states `[tokens, hidden]`, top_k_index and top_k_weights `[tokens, k]` -> `[tokens, hidden]`."""
        shape = hidden_states.shape
        x = hidden_states.reshape(-1, shape[-1])  # [tokens, hidden]
        call = MoeCall(self.layer, chunk_size=self.chunk_size, retain=self.retain)
        lora = NO_LORA
        if self.lora is not None and self.lora.active():
            lora = self.lora.tensors()
            call.operands = self.lora.operands()
            call.scales = self.lora.scales()
            if self.training and self.lora.dropout > 0.0:
                call.dropout = self.lora.dropout
                # From torch's CPU generator: seeded with the run, and given back by checkpointing for its recompute.
                call.seed = int(torch.randint(0, 2**62, ()).item())
        return moe(x, top_k_index, top_k_weights, lora, call).reshape(shape)

    def _apply(self, fn, recurse=True):
        """Device and dtype moves leave expert data and placeholders alone."""
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """No expert data in state dicts: checkpoints with experts are written by `save_full_model`."""

    def _load_from_state_dict(self, *args, **kwargs):
        """Nothing to load: `load_expert` fills the layer."""

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, hidden={self.hidden_dim}, inter={self.intermediate_dim}, {self.spec.activation}, bf16"


def _placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, dtype=dtype).expand(shape), requires_grad=False)
