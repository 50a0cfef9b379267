"""The module that takes the place of a transformers experts module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kt_sft.models.spec import ExpertsSpec
from kt_sft.native import native
from kt_sft.nn.expert_lora import ExpertLora
from kt_sft.ops.moe import NO_LORA, MoeCall, moe

PLACEHOLDERS = ("gate_up_proj", "down_proj")


class RoutedExperts(nn.Module):
    """All routed experts of one layer, on the CPU, behind transformers' experts interface.

    Args:
        spec: sizes and activation.
        chunk_size: tokens per native pass.
        cpu_activation: `retain` or `recompute` gate and up products in backward.
        dtype: that the placeholders show to PEFT.

    `gate_up_proj` `[num_experts, 2 * inter, hidden]` and `down_proj` `[num_experts, hidden, inter]` are placeholders
    of one element with stride zero: they tell other libraries the shapes, the weights live packed in the native layer.
    """

    def __init__(
        self, spec: ExpertsSpec, *, chunk_size: int = 1024, cpu_activation: str = "retain", dtype=torch.bfloat16
    ):
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
        kind = {"dtype": torch.bfloat16, "device": "cpu"}
        gate, up = (torch.empty(self.intermediate_dim, self.hidden_dim, **kind) for _ in range(2))
        down = torch.empty(self.hidden_dim, self.intermediate_dim, **kind)
        self.layer.unpack_expert(index, gate, up, down)
        return gate, up, down

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self.layer.packed_bytes

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states `[tokens, hidden]`, top_k_index and top_k_weights `[tokens, k]` -> `[tokens, hidden]`."""
        if "parametrizations" in self._modules:  # PEFT's own wrapper put W + delta over a placeholder: nobody reads it
            raise RuntimeError(
                "expert LoRA: PEFT wrapped the experts but nothing bound its LoRA to the kernels; "
                "use kt_sft.get_peft_model or kt_sft.load_adapter instead of PEFT's own"
            )
        shape = hidden_states.shape
        x = hidden_states.reshape(-1, shape[-1])  # [tokens, hidden]
        call = MoeCall(self.layer, chunk_size=self.chunk_size, retain=self.retain)
        lora = NO_LORA
        if self.lora is not None and self.lora.active():
            lora = self.lora.tensors()
            call.operands = self.lora.operands()
            call.after_backward = self.lora.drop_copies
            call.scales = self.lora.scales()
            if self.training and self.lora.dropout > 0.0:
                call.dropout = self.lora.dropout
                # From torch's CPU generator: seeded with the run, and given back by checkpointing for its recompute.
                call.seed = int(torch.randint(0, 2**62, (), device="cpu").item())
        return moe(x, top_k_index, top_k_weights, lora, call).reshape(shape)

    def _apply(self, fn, recurse=True):
        """Device and dtype moves leave expert data and placeholders alone."""
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """No expert data in state dicts: checkpoints with experts are written by `save_full_model`."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        """Nothing is taken, `load_expert` fills the layer: expert tensors in a state dict are unexpected."""
        unexpected_keys.extend(f"{prefix}{name}" for name in PLACEHOLDERS if f"{prefix}{name}" in state_dict)

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "RoutedExperts: packed experts cannot be copied or pickled; save with model.save_pretrained, "
            "and load the model again for a second one"
        )

    def extra_repr(self) -> str:
        sizes = f"num_experts={self.num_experts}, hidden={self.hidden_dim}, inter={self.intermediate_dim}"
        return f"{sizes}, {self.spec.activation}, bf16"


def _placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, dtype=dtype).expand(shape), requires_grad=False)
