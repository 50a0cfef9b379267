"""The two checkpoint forms: tensors under each family's own names, and its configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .gguf_source import DenseModel
from .slicing import NUM_EXPERTS, TOP_K, slice_ffn

NamedTensors = Iterator[tuple[str, Tensor]]

_QWEN_HEAD_DIM = 128
_QUIET = 2.0**14  # rms that q/k padding forces on the norms: |q|^2 / _QUIET^2 is below f32 rounding
_SHARED_CONFIG = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How one model family writes a sparse MoE to disk."""

    name: str
    config: Callable[[DenseModel], Any]  # -> transformers config
    tensors: Callable[[DenseModel, list[Tensor]], NamedTensors]


def _shared_config(dense: DenseModel) -> dict[str, Any]:
    return {key: dense.config[key] for key in _SHARED_CONFIG}


def _outside_layers(dense: DenseModel) -> NamedTensors:
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        yield name, dense.state[name]


def _layer(dense: DenseModel, index: int) -> tuple[str, dict[str, Tensor]]:
    prefix = f"model.layers.{index}."
    return prefix, {k.removeprefix(prefix): v for k, v in dense.state.items() if k.startswith(prefix)}


def _sliced(layer: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return slice_ffn(*(layer[f"mlp.{part}_proj.weight"] for part in ("gate", "up", "down")))


def mixtral_config(dense: DenseModel):
    from transformers import MixtralConfig

    return MixtralConfig(
        **_shared_config(dense),
        intermediate_size=dense.config["intermediate_size"] // TOP_K,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        architectures=["MixtralForCausalLM"],
    )


def mixtral_tensors(dense: DenseModel, routers: list[Tensor]) -> NamedTensors:
    """Attention and norms as they are; the FFN as `block_sparse_moe` with w1 = gate, w2 = down, w3 = up."""
    yield from _outside_layers(dense)
    for index, router in enumerate(routers):
        prefix, layer = _layer(dense, index)
        yield from ((prefix + name, weight) for name, weight in layer.items() if not name.startswith("mlp."))
        yield f"{prefix}block_sparse_moe.gate.weight", router
        for expert, (gate, up, down) in enumerate(_sliced(layer)):
            for name, weight in (("w1", gate), ("w2", down), ("w3", up)):
                yield f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight", weight


def qwen3_moe_config(dense: DenseModel):
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        **_shared_config(dense),
        intermediate_size=dense.config["intermediate_size"],
        moe_intermediate_size=dense.config["intermediate_size"] // TOP_K,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        head_dim=_QWEN_HEAD_DIM,
        attention_bias=True,
        architectures=["Qwen3MoeForCausalLM"],
    )


def _spread_positions(head_dim: int) -> Tensor:
    """Where each dim of a 64-wide head goes in a 128-wide one, so that its rotary frequency stays the same.

    Pair j of a D-wide head turns by theta^(-2 j / D), so pair j of 64 is pair 2 j of 128; partners are D / 2 apart.
    """
    pair = torch.arange(head_dim // 2) * (_QWEN_HEAD_DIM // head_dim)
    return torch.cat([pair, pair + _QWEN_HEAD_DIM // 2])  # [head_dim]


def _spread_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q, k or v `[heads * 64, hidden]` -> `[heads * 128, hidden]`, zero rows between."""
    heads = weight.shape[0] // head_dim
    wide = weight.new_zeros(heads, _QWEN_HEAD_DIM, weight.shape[1])
    wide[:, _spread_positions(head_dim)] = weight.view(heads, head_dim, -1)
    return wide.flatten(0, 1)


def _quiet_norm(head_dim: int, *, num_heads: int, num_loud: int, scale: float) -> tuple[Tensor, Tensor]:
    """Bias `[heads * 128]` and norm weight `[128]` that turn q_norm / k_norm into a multiplication by `scale`.

    `num_loud` padding dims get the constant bias b; the rms over 128 dims is then b sqrt(num_loud / 128) whatever the
    real dims hold. The norm weight multiplies that rms back in on the real dims and is zero on the padding.
    """
    real = _spread_positions(head_dim)
    padding = torch.ones(_QWEN_HEAD_DIM, dtype=torch.bool)
    padding[real] = False
    bias = torch.zeros(num_heads, _QWEN_HEAD_DIM)
    bias[:, padding.nonzero().flatten()[:num_loud]] = _QUIET
    norm = torch.zeros(_QWEN_HEAD_DIM)
    norm[real] = scale * _QUIET * math.sqrt(num_loud / _QWEN_HEAD_DIM)
    return bias.flatten(), norm


def _qwen3_attention(dense: DenseModel, layer: dict[str, Tensor]) -> NamedTensors:
    heads, kv_heads = dense.config["num_attention_heads"], dense.config["num_key_value_heads"]
    hidden = dense.config["hidden_size"]
    head_dim = hidden // heads
    for name in ("q_proj", "k_proj", "v_proj"):
        yield f"{name}.weight", _spread_rows(layer[f"self_attn.{name}.weight"], head_dim)
    yield "o_proj.weight", _spread_rows(layer["self_attn.o_proj.weight"].T, head_dim).T.contiguous()
    # Scores are divided by sqrt(128) instead of sqrt(64): q makes up for it. The numbers of loud dims are such that
    # both norm weights are powers of two, hence exact in bf16.
    widening = math.sqrt(_QWEN_HEAD_DIM / head_dim)
    q_bias, q_norm = _quiet_norm(head_dim, num_heads=heads, num_loud=64, scale=widening)
    k_bias, k_norm = _quiet_norm(head_dim, num_heads=kv_heads, num_loud=32, scale=1.0)
    yield from (("q_proj.bias", q_bias), ("k_proj.bias", k_bias), ("q_norm.weight", q_norm), ("k_norm.weight", k_norm))
    yield "v_proj.bias", torch.zeros(kv_heads * _QWEN_HEAD_DIM)
    yield "o_proj.bias", torch.zeros(hidden)


def qwen3_moe_tensors(dense: DenseModel, routers: list[Tensor]) -> NamedTensors:
    """Heads widened from 64 to 128 with q/k norms made neutral; the FFN as `mlp.experts`."""
    yield from _outside_layers(dense)
    for index, router in enumerate(routers):
        prefix, layer = _layer(dense, index)
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            yield prefix + name, layer[name]
        yield from ((f"{prefix}self_attn.{name}", weight) for name, weight in _qwen3_attention(dense, layer))
        yield f"{prefix}mlp.gate.weight", router
        for expert, (gate, up, down) in enumerate(_sliced(layer)):
            for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                yield f"{prefix}mlp.experts.{expert}.{name}.weight", weight


FAMILIES = {
    family.name: family
    for family in (
        Family("mixtral", mixtral_config, mixtral_tensors),
        Family("qwen3_moe", qwen3_moe_config, qwen3_moe_tensors),
    )
}
