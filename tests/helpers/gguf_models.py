"""Whole tiny models as GGUF files, as llama.cpp's converter names, permutes and describes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers import gguf_files

ARCHITECTURES = {"qwen3_moe": "qwen3moe", "mixtral": "llama", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2"}
_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_EXPERT = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


def write_model(source: Path, file: Path, *, split_kv_b: bool = False, kind: str = "BF16") -> Path:
    """A checkpoint of `tiny_models` as one GGUF file; `kind` is the type of the experts."""
    config = json.loads((source / "config.json").read_text())
    tensors: dict[str, gguf_files.Encoded] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for key, value in load_file(source / "model.safetensors").items():
        parts = key.removeprefix("model.").split(".")
        if parts[0] != "layers":
            name = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[parts[0]]
            tensors[f"{name}.weight"] = encode(value, "BF16")
        elif "experts" in parts:
            at = parts.index("experts")
            name = f"blk.{parts[1]}.ffn_{_EXPERT[parts[at + 2]]}_exps.weight"
            experts.setdefault(name, {})[int(parts[at + 1])] = value
        elif parts[-1] == "e_score_correction_bias":
            tensors[f"blk.{parts[1]}.exp_probs_b.bias"] = encode(value, "F32")
        else:
            tensors.update(_layer_tensor(f"blk.{parts[1]}.", ".".join(parts[2:-1]), value, config, split_kv_b))
    for name, values in experts.items():
        tensors[name] = encode(torch.stack([values[index] for index in range(len(values))]), kind)
    return gguf_files.write(file, _metadata(config, split_kv_b) | tokenizer(config["vocab_size"]), tensors)


def encode(value: Tensor, kind: str) -> gguf_files.Encoded:
    """One-dimensional tensors are F32 in every GGUF file."""
    return gguf_files.encode(value.float().numpy(), "F32" if value.dim() == 1 else kind)


def _layer_tensor(
    block: str, part: str, value: Tensor, config: dict[str, Any], split_kv_b: bool
) -> dict[str, gguf_files.Encoded]:
    if config["model_type"] == "mixtral" and part in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = config["num_attention_heads" if "q_proj" in part else "num_key_value_heads"]
        halves = value.reshape(heads, 2, value.shape[0] // heads // 2, value.shape[1])
        value = halves.swapaxes(1, 2).reshape(value.shape)
    if part == "self_attn.kv_b_proj" and split_kv_b:
        nope, rank = config["qk_nope_head_dim"], config["kv_lora_rank"]
        both = value.reshape(config["num_attention_heads"], -1, rank)
        keys, values = both[:, :nope].transpose(1, 2), both[:, nope:]
        return {f"{block}attn_k_b.weight": encode(keys, "BF16"), f"{block}attn_v_b.weight": encode(values, "BF16")}
    return {f"{block}{_NAMES[part]}.weight": encode(value, "F32" if part.split(".")[-1] == "gate" else "BF16")}


def _metadata(config: dict[str, Any], split_kv_b: bool) -> dict[str, Any]:
    kind = config["model_type"]
    architecture = ARCHITECTURES[kind]
    rope = config.get("rope_parameters") or {}
    values: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(np.float32(config["rms_norm_eps"])),
        "rope.freq_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "expert_count": config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts"),
        "expert_used_count": config["num_experts_per_tok"],
    }
    if kind == "qwen3_moe":
        values |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
        values["expert_feed_forward_length"] = config["moe_intermediate_size"]
    elif kind == "mixtral":
        values["rope.dimension_count"] = config["head_dim"]
    else:
        values |= _deepseek(config, split_kv_b)
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in values.items()}


def _deepseek(config: dict[str, Any], split_kv_b: bool) -> dict[str, Any]:
    key, rope = config["qk_nope_head_dim"] + config["qk_rope_head_dim"], config["qk_rope_head_dim"]
    sizes = {"attention.key_length": key, "attention.value_length": config["v_head_dim"]}
    if split_kv_b:
        rank = config["kv_lora_rank"]
        sizes = {f"{name}_mla": size for name, size in sizes.items()}
        sizes |= {"attention.key_length": rank + rope, "attention.value_length": rank, "attention.head_count_kv": 1}
    is_v3 = config["model_type"] == "deepseek_v3"
    groups = {"expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"]}
    return {
        **sizes,
        **(groups if is_v3 else {}),
        "attention.q_lora_rank": config["q_lora_rank"],
        "attention.kv_lora_rank": config["kv_lora_rank"],
        "rope.dimension_count": rope,
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": bool(config["norm_topk_prob"]) if is_v3 else False,
        "expert_gating_func": 2 if is_v3 else 1,
    }


def tokenizer(size: int) -> dict[str, Any]:
    """A byte-level vocabulary of ASCII characters; 0, 1, 2 are padding, begin and end of text, the last ChatML's."""
    tokens = ["<pad>", "<s>", "</s>", "Ġ", "Ċ", "ab", "Ġc"] + [chr(code) for code in range(33, 127)]
    tokens += [f"<|spare{number}|>" for number in range(size - 2 - len(tokens))] + ["<|im_start|>", "<|im_end|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 5) + [3, 3],
        "tokenizer.ggml.merges": ["a b", "Ġ c"],
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
