"""From a transformers config to the metadata of a GGUF file, for the architectures that `gguf_config` reads.

Keys: those that llama.cpp's loader asks for and its convert_hf_to_gguf.py writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kt_sft.errors import UnsupportedModel
from kt_sft.formats.gguf_names import ARCHITECTURES

FILE_TYPES = {"Q8_0": 7, "BF16": 32}  # general.file_type
_SOFTMAX, _SIGMOID = 1, 2  # expert_gating_func


def model_metadata(config: Mapping[str, Any], name: str, kind: str) -> dict[str, Any]:
    """Metadata of a whole model, the tokenizer left out.

    Args:
        config: values of config.json as transformers understands them.
        name: for general.name.
        kind: type of most tensors.
    Raises:
        UnsupportedModel: another family, or a setting that such a file cannot state.
    """
    model_type = config["model_type"]
    if model_type not in ARCHITECTURES:
        expected = f"one of {', '.join(ARCHITECTURES)}"
        raise UnsupportedModel("GGUF model", expected=expected, found=f"model type {model_type}")
    architecture = ARCHITECTURES[model_type]
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "vocab_size": config["vocab_size"],
        "expert_used_count": config["num_experts_per_tok"],
        **_FAMILIES[architecture](config),
        **_rope(config),
    }
    general = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
    }
    return general | {f"{architecture}.{key}": value for key, value in values.items()}


def _refuse(what: str, expected: object, found: object) -> UnsupportedModel:
    return UnsupportedModel(f"GGUF model: {what}", expected=expected, found=found, remedy="merge into hf instead")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    values: dict[str, Any] = {"rope.freq_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)}
    if kind == "default":
        return values
    if kind not in ("linear", "yarn"):
        raise _refuse("rope scaling", "none, linear or yarn", repr(kind))
    values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        values["rope.scaling.original_context_length"] = int(original)
        if rope.get("attention_factor") is not None:
            raise _refuse("attention_factor", "that of yarn", rope["attention_factor"])
        for name, default in (("beta_fast", 32), ("beta_slow", 1)):
            if (rope.get(name) or default) != default:
                values[f"rope.scaling.yarn_{name}"] = float(rope[name])
        if config["model_type"].startswith(("deepseek", "kimi")):
            if rope.get("mscale") != rope.get("mscale_all_dim"):
                raise _refuse("mscale", f"{rope.get('mscale_all_dim')}, as mscale_all_dim", rope.get("mscale"))
            values["rope.scaling.yarn_log_multiplier"] = 0.1 * float(rope.get("mscale_all_dim") or 0.0)
    return values


def _qwen3_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("norm_topk_prob") is False:
        raise _refuse("norm_topk_prob", True, False)
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise _refuse("layers", "experts in every one", "dense ones among them")
    return {
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "expert_count": config.get("num_experts") or config["num_local_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }


def _mixtral(config: Mapping[str, Any]) -> dict[str, Any]:
    window = config.get("sliding_window")
    if window is not None and window < config["max_position_embeddings"]:
        raise _refuse("sliding_window", "none", window)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "expert_count": config.get("num_local_experts") or config["num_experts"],
    }


def _deepseek(config: Mapping[str, Any]) -> dict[str, Any]:
    is_v3 = config["model_type"] != "deepseek_v2"
    if config.get("rope_interleave") is False:
        raise _refuse("rope_interleave", True, False)
    rope = config["qk_rope_head_dim"]
    values = {
        # kv_b in one piece: attention on the heads, not on the compressed keys.
        "attention.head_count_kv": config["num_attention_heads"],
        "attention.key_length": config["qk_nope_head_dim"] + rope,
        "attention.value_length": config["v_head_dim"],
        "attention.kv_lora_rank": config["kv_lora_rank"],
        "rope.dimension_count": rope,
        "expert_count": config.get("n_routed_experts") or config["num_local_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config.get("n_shared_experts") or 0,
        "leading_dense_block_count": config.get("first_k_dense_replace") or 0,
        "expert_weights_scale": float(config.get("routed_scaling_factor") or 1.0),
        "expert_weights_norm": bool(config.get("norm_topk_prob", is_v3)),
        "expert_gating_func": _SIGMOID if is_v3 else _SOFTMAX,
    }
    if config.get("q_lora_rank"):
        values["attention.q_lora_rank"] = config["q_lora_rank"]
    if (config.get("n_group") or 1) > 1:
        values |= {"expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"]}
    return values


_FAMILIES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "qwen3moe": _qwen3_moe,
    "llama": _mixtral,
    "deepseek2": _deepseek,
}
