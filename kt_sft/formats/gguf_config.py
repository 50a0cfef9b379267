"""From the metadata of a GGUF file to a transformers config.json, for the architectures that are read as whole models.

Keys: docs/gguf.md of the ggml project and the writers of llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kt_sft.errors import FormatError, UnsupportedModel
from kt_sft.formats.config_values import MOST_SIZE, check_values
from kt_sft.formats.gguf import GgufIndex

_SOFTMAX, _SIGMOID = 1, 2  # expert_gating_func
_BLOCK = re.compile(r"blk\.(\d{1,9})\.")
_CORRECT = "download the file again"
_SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
# What messages call the values of config.json.
_GGUF_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "num_experts_per_tok": "expert_used_count",
    "rope_theta": "rope.freq_base",
    "intermediate_size": "feed_forward_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_experts": "expert_count",
    "num_local_experts": "expert_count",
    "n_routed_experts": "expert_count",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
    "v_head_dim": "attention.value_length",
    "rope_scaling.factor": "rope.scaling.factor",
    "rope_scaling.original_max_position_embeddings": "rope.scaling.original_context_length",
    "rope_scaling.beta_fast": "rope.scaling.yarn_beta_fast",
    "rope_scaling.beta_slow": "rope.scaling.yarn_beta_slow",
    "rope_scaling.mscale": "rope.scaling.yarn_log_multiplier",
}
_REMEDY = "use the model directory of its safetensors version, and the GGUF file as kt_weight_path"
# Keys that change nothing: what tensors' shapes say, too, and notes of the converter.
_INERT = {
    "vocab_size",
    "tensor_data_layout",
    "attention.value_length",
    "attention.head_count_kv",
    "attention.layer_norm_epsilon",
    "expert_shared_feed_forward_length",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
}


@dataclass
class Metadata:
    """The keys of one architecture, `qwen3moe.block_count` as `block_count`, with their types checked.

    Args:
        asked: the keys that anybody has asked for.
    """

    index: GgufIndex
    architecture: str
    asked: set[str] = field(default_factory=set)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; one number for all layers where the file lists one per layer.

        Raises:
            FormatError: missing without a default, no whole number, or different from layer to layer.
        """
        value = self._value(key, default)
        items = value.tolist() if hasattr(value, "tolist") else [value]
        if not items or any(type(item) is not int for item in items) or len(set(items)) != 1:
            raise self.fault(key, "one whole number", value)
        layers = self.index.metadata.get(f"{self.architecture}.block_count")
        if hasattr(value, "tolist") and len(items) != layers:
            raise self.fault(key, f"one whole number for each of {layers} blocks", f"{len(items)} of them")
        return items[0]

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """`integer` that other numbers are computed from.

        Raises:
            FormatError: also below `least`, or above what any model has.
        """
        value = self.integer(key, default)
        if not least <= value <= MOST_SIZE:
            raise self.fault(key, f"a whole number from {least} to {MOST_SIZE}", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number, as the shortest decimal that is the same in float32.

        Raises:
            FormatError: missing without a default, or no number.
        """
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fault(key, "a number", value)
        return float(f"{value:.7g}")

    def flag(self, key: str, default: bool) -> bool:
        """True or false.

        Raises:
            FormatError: something else.
        """
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.fault(key, "true or false", value)
        return value

    def has(self, key: str) -> bool:
        """Whether the file has the key."""
        return f"{self.architecture}.{key}" in self.index.metadata

    def expect(self, key: str, *allowed: float) -> None:
        """Raise where the file states anything but what the model does anyway.

        Raises:
            UnsupportedModel: names the key.
        """
        self.asked.add(key)
        value = self.index.metadata.get(f"{self.architecture}.{key}", allowed[0])
        if not isinstance(value, int | float) or value not in allowed:
            raise self.unsupported(key, " or ".join(map(str, allowed)), value)

    def expect_known(self) -> None:
        """Raise where the file has a key of the architecture that nobody asked for: the model might need it.

        Raises:
            UnsupportedModel: names it.
        """
        own = (name for name in self.index.metadata if name.startswith(f"{self.architecture}."))
        unknown = sorted(key for _, _, key in (name.partition(".") for name in own) if key not in self.asked | _INERT)
        if unknown:
            value = self.index.metadata[f"{self.architecture}.{unknown[0]}"]
            raise self.unsupported(unknown[0], "keys of a model that is read from one GGUF file", value)

    def unsupported(self, key: str, expected: str, found: object) -> UnsupportedModel:
        """Of a key whose value is not followed."""
        what = f"{self.index.source}: metadata {self.architecture}.{key}"
        return UnsupportedModel(what, expected=expected, found=repr(found)[:80], remedy=_REMEDY)

    def _value(self, key: str, default: Any) -> Any:
        self.asked.add(key)
        value = self.index.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise self.fault(key, "present", "missing")
        return value

    def fault(self, key: str, expected: str, found: object) -> FormatError:
        what = f"metadata {self.architecture}.{key}"
        return FormatError(self.index.source, what, expected=expected, found=str(found)[:80], remedy=_CORRECT)


def model_config(index: GgufIndex) -> dict[str, Any]:
    """Values of config.json.

    Raises:
        FormatError: a key is missing or of a wrong type.
        UnsupportedModel: another architecture, a dense model, or a key that is not known.
    """
    architecture = index.text("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModel(
            f"{index.source}: general.architecture",
            expected=f"{', '.join(_ARCHITECTURES)} as the only model file",
            found=repr(architecture),
            remedy=_REMEDY,
        )
    meta = Metadata(index, architecture)
    if meta.count("expert_count", 0, least=0) < 1:
        raise UnsupportedModel(f"{index.source}", expected="a mixture of experts", found="a dense model")
    config = {
        "hidden_size": meta.integer("embedding_length"),
        "num_hidden_layers": _layers(meta),
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
    if (scaling := _rope_scaling(meta)) is not None:
        config["rope_scaling"] = scaling
    window = meta.integer("attention.sliding_window", 0)
    if 0 < window < config["max_position_embeddings"]:
        raise meta.unsupported("attention.sliding_window", "attention to all of the context", window)
    meta.expect("attention.causal", True)
    meta.expect_known()
    names = {config: f"tokenizer.ggml.{name}_token_id" for name, config in _SPECIAL.items()}
    names |= {config: f"{architecture}.{key}" for config, key in _GGUF_KEYS.items()}
    check_values(index.source, config, names)
    return config


def _layers(meta: Metadata) -> int:
    """Blocks of the model, those that predict further tokens left out; all of them are in the file."""
    blocks, extra = meta.count("block_count"), meta.count("nextn_predict_layers", 0, least=0)
    if extra >= blocks:
        raise meta.fault("nextn_predict_layers", f"a whole number below block_count {blocks}", extra)
    stored = {int(found[1]) for name in meta.index if (found := _BLOCK.match(name))}
    if stored and max(stored) + 1 < blocks - extra:
        raise meta.fault("block_count", f"at most {max(stored) + 1 + extra}, the blocks in the file", blocks)
    return blocks - extra


def _special_ids(index: GgufIndex) -> dict[str, Any]:
    found = {config: index.metadata.get(f"tokenizer.ggml.{name}_token_id") for name, config in _SPECIAL.items()}
    return {
        name: value.tolist() if hasattr(value, "tolist") else value
        for name, value in found.items()
        if value is not None
    }


def _rope_scaling(meta: Metadata) -> dict[str, Any] | None:
    """As llama.cpp reads it: linear where a factor stands alone, under its old name, too."""
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"):
        meta.expect(key, 1.0)
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 0.0))
    fast, slow = meta.number("rope.scaling.yarn_beta_fast", 32.0), meta.number("rope.scaling.yarn_beta_slow", 1.0)
    # DeepSeek: a tenth of mscale_all_dim
    mscale = float(f"{meta.number('rope.scaling.yarn_log_multiplier', 0.0) * 10:.6g}")
    meta.asked.add("rope.scaling.type")
    kind = meta.index.text(f"{meta.architecture}.rope.scaling.type", "linear")
    if kind not in ("yarn", "linear", "none"):
        raise UnsupportedModel(f"{meta.index.source}: rope scaling", expected="none, linear or yarn", found=repr(kind))
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "type": kind, "factor": factor}
    if kind == "yarn":
        scaling["factor"] = meta.number("rope.scaling.factor")
        scaling["original_max_position_embeddings"] = meta.integer("rope.scaling.original_context_length")
        scaling |= {"beta_fast": _plain(fast), "beta_slow": _plain(slow)}
        if meta.has("rope.scaling.yarn_log_multiplier"):
            scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
    return scaling


def _plain(value: float) -> float | int:
    return int(value) if value.is_integer() else value


def _qwen3_moe(meta: Metadata) -> dict[str, Any]:
    head_dim = meta.integer("attention.key_length")
    meta.expect("rope.dimension_count", head_dim)
    meta.expect("expert_gating_func", _SOFTMAX)
    meta.expect("expert_shared_count", 0)
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_key_value_heads": meta.integer("attention.head_count_kv"),
        "head_dim": head_dim,
        "intermediate_size": meta.integer("feed_forward_length"),
        "moe_intermediate_size": meta.integer("expert_feed_forward_length"),
        "num_experts": meta.integer("expert_count"),
        "norm_topk_prob": meta.flag("expert_weights_norm", True),  # llama.cpp always normalises
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    }


def _mixtral(meta: Metadata) -> dict[str, Any]:
    heads = meta.count("attention.head_count")
    rope = meta.count("rope.dimension_count", meta.count("embedding_length") // heads)
    meta.expect("attention.key_length", rope)
    meta.expect("expert_gating_func", _SOFTMAX)
    meta.expect("expert_shared_count", 0)
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_key_value_heads": meta.integer("attention.head_count_kv", heads),
        "head_dim": rope,
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_local_experts": meta.integer("expert_count"),
        "sliding_window": None,
    }


def _deepseek(meta: Metadata) -> dict[str, Any]:
    meta.expect("expert_gating_func", _SOFTMAX, _SIGMOID)
    is_v3 = meta.integer("expert_gating_func", _SOFTMAX) == _SIGMOID
    rope = meta.count("rope.dimension_count")
    # Files with split kv_b state the sizes of the decompressed heads under names of their own.
    key = meta.integer("attention.key_length_mla", meta.integer("attention.key_length"))
    value = meta.integer("attention.value_length_mla", meta.integer("attention.value_length"))
    groups = meta.integer("expert_group_count", 1)
    if not rope < key <= MOST_SIZE:
        raise meta.fault("attention.key_length", f"more than rope.dimension_count {rope}, at most {MOST_SIZE}", key)
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
        "norm_topk_prob": meta.flag("expert_weights_norm", is_v3),
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
