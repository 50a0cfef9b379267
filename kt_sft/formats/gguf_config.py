"""From the metadata of a GGUF file to a transformers config.json, for the architectures that are read as whole models.

Keys: docs/gguf.md of the ggml project and the writers of llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kt_sft.errors import FormatError, UnsupportedModel
from kt_sft.formats.gguf import GgufIndex

_SIGMOID = 2  # expert_gating_func


@dataclass
class Metadata:
    """The keys of one architecture, `qwen3moe.block_count` as `block_count`, with their types checked."""

    index: GgufIndex
    architecture: str

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; one number for all layers where the file lists one per layer.

        Raises:
            FormatError: missing without a default, no whole number, or different from layer to layer.
        """
        value = self._value(key, default)
        values = {int(item) for item in value} if hasattr(value, "__len__") and not isinstance(value, str) else {value}
        if len(values) != 1 or type(next(iter(values))) is not int:
            raise self._fault(key, "one whole number", value)
        return values.pop()

    def number(self, key: str, default: float | None = None) -> float:
        """A number, as the shortest decimal that is the same in float32.

        Raises:
            FormatError: missing without a default, or no number.
        """
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._fault(key, "a number", value)
        return float(f"{value:.7g}")

    def has(self, key: str) -> bool:
        """Whether the file has the key."""
        return f"{self.architecture}.{key}" in self.index.metadata

    def _value(self, key: str, default: Any) -> Any:
        value = self.index.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise self._fault(key, "present", "missing")
        return value

    def _fault(self, key: str, expected: str, found: object) -> FormatError:
        what = f"metadata {self.architecture}.{key}"
        return FormatError(self.index.source, what, expected=expected, found=str(found)[:80])


def model_config(index: GgufIndex) -> dict[str, Any]:
    """Values of config.json.

    Raises:
        FormatError: a key is missing or of a wrong type.
        UnsupportedModel: another architecture, or a dense model.
    """
    architecture = index.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModel(
            f"{index.source}: general.architecture",
            expected=f"{', '.join(_ARCHITECTURES)} as the only model file",
            found=repr(architecture),
            remedy="use the model directory of its safetensors version, and the GGUF file as kt_weight_path",
        )
    meta = Metadata(index, architecture)
    if meta.integer("expert_count", 0) < 1:
        raise UnsupportedModel(f"{index.source}", expected="a mixture of experts", found="a dense model")
    config = {
        "hidden_size": meta.integer("embedding_length"),
        "num_hidden_layers": meta.integer("block_count") - meta.integer("nextn_predict_layers", 0),
        "num_attention_heads": meta.integer("attention.head_count"),
        "max_position_embeddings": meta.integer("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": index.info("token_embd.weight").shape[0],
        "tie_word_embeddings": "output.weight" not in index,
        "num_experts_per_tok": meta.integer("expert_used_count"),
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "rope_theta": meta.number("rope.freq_base", 10000.0),
        **_special_ids(index),
        **_ARCHITECTURES[architecture](meta),
    }
    if meta.index.metadata.get(f"{architecture}.rope.scaling.type", "none") != "none":
        config["rope_scaling"] = _rope_scaling(meta)
    return config


def _special_ids(index: GgufIndex) -> dict[str, int]:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    found = {config: index.metadata.get(f"tokenizer.ggml.{name}_token_id") for name, config in names.items()}
    return {name: value for name, value in found.items() if type(value) is int}


def _rope_scaling(meta: Metadata) -> dict[str, Any]:
    kind = meta.index.metadata[f"{meta.architecture}.rope.scaling.type"]
    if kind not in ("yarn", "linear"):
        raise UnsupportedModel(f"{meta.index.source}: rope scaling", expected="none, linear or yarn", found=repr(kind))
    scaling: dict[str, Any] = {"rope_type": kind, "type": kind, "factor": meta.number("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = meta.integer("rope.scaling.original_context_length")
        if meta.has("rope.scaling.yarn_log_multiplier"):  # DeepSeek: a tenth of mscale_all_dim
            mscale = float(f"{meta.number('rope.scaling.yarn_log_multiplier') * 10:.6g}")
            scaling |= {"mscale": mscale, "mscale_all_dim": mscale, "beta_fast": 32, "beta_slow": 1}
    return scaling


def _qwen3_moe(meta: Metadata) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_key_value_heads": meta.integer("attention.head_count_kv"),
        "head_dim": meta.integer("attention.key_length"),
        "intermediate_size": meta.integer("feed_forward_length"),
        "moe_intermediate_size": meta.integer("expert_feed_forward_length"),
        "num_experts": meta.integer("expert_count"),
        "norm_topk_prob": True,  # llama.cpp has no key for it and always normalises
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    }


def _mixtral(meta: Metadata) -> dict[str, Any]:
    heads = meta.integer("attention.head_count")
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_key_value_heads": meta.integer("attention.head_count_kv", heads),
        "head_dim": meta.integer("rope.dimension_count", meta.integer("embedding_length") // heads),
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_local_experts": meta.integer("expert_count"),
        "sliding_window": None,
    }


def _deepseek(meta: Metadata) -> dict[str, Any]:
    is_v3 = meta.integer("expert_gating_func", 1) == _SIGMOID
    rope = meta.integer("rope.dimension_count")
    # Files with split kv_b state the sizes of the decompressed heads under names of their own.
    key = meta.integer("attention.key_length_mla", meta.integer("attention.key_length"))
    value = meta.integer("attention.value_length_mla", meta.integer("attention.value_length"))
    groups = meta.integer("expert_group_count", 1)
    config = {
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        "num_key_value_heads": meta.integer("attention.head_count"),
        "q_lora_rank": meta.integer("attention.q_lora_rank") if meta.has("attention.q_lora_rank") else None,
        "kv_lora_rank": meta.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": key - rope,
        "v_head_dim": value,
        "intermediate_size": meta.integer("feed_forward_length"),
        "moe_intermediate_size": meta.integer("expert_feed_forward_length"),
        "n_routed_experts": meta.integer("expert_count"),
        "n_shared_experts": meta.integer("expert_shared_count", 0),
        "first_k_dense_replace": meta.integer("leading_dense_block_count", 0),
        "routed_scaling_factor": meta.number("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(meta.index.metadata.get("deepseek2.expert_weights_norm", is_v3)),
        "n_group": groups,
        "topk_group": meta.integer("expert_group_used_count", groups),
        "attention_bias": False,
    }
    if not is_v3:
        config["topk_method"] = "greedy" if groups == 1 else "group_limited_greedy"
    return config


_ARCHITECTURES: dict[str, Callable[[Metadata], dict[str, Any]]] = {
    "qwen3moe": _qwen3_moe,
    "llama": _mixtral,
    "deepseek2": _deepseek,
}
