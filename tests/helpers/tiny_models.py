"""Tiny random mixture-of-experts checkpoints, one per family, written as the hub's are: safetensors, per-expert keys.

Sizes are no multiples of a kernel tile and 2 * inter != hidden, so that a swapped axis or a transposed weight cannot
go unnoticed. Stock models here run transformers' eager experts: grouped_mm wants rows of whole 16 bytes and no float64.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCAB = 131
FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3")


@dataclass(frozen=True)
class Family:
    """transformers' class names and the config of the tiny member."""

    config_class: str
    model_class: str
    values: dict[str, Any]


_COMMON = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_hidden_layers": 3,
}
_TABLE = {
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "hidden_size": 48,
            "intermediate_size": 44,
            "moe_intermediate_size": 20,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": Family(
        "MixtralConfig",
        "MixtralForCausalLM",
        {
            "hidden_size": 56,
            "intermediate_size": 36,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 2,
            "head_dim": 14,
        },
    ),
    "deepseek_v2": Family(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {
            **_MLA,
            "hidden_size": 52,
            "intermediate_size": 60,
            "moe_intermediate_size": 28,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
        },
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **_MLA,
            "hidden_size": 44,
            "intermediate_size": 60,
            "moe_intermediate_size": 20,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
    ),
}


def config(family: str, **overrides: Any) -> Any:
    """transformers config of the tiny member; `overrides` replace values of it."""
    import transformers

    entry = _TABLE[family]
    return getattr(transformers, entry.config_class)(**{**_COMMON, **entry.values, **overrides})


def model(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """Stock transformers model with random weights that are exact in bf16, held in float32, in eval mode.

    Weights are larger than transformers' initialisation, so that routing is decided and every expert matters.
    """
    import transformers

    torch.manual_seed(seed)
    settings = config(family, **overrides)
    settings._experts_implementation = "eager"
    stock = getattr(transformers, _TABLE[family].model_class)(settings).float().eval()
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5 if "embed" not in name else 1.0)
            parameter.copy_(parameter.to(torch.bfloat16))
        for name, buffer in stock.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(-0.1, 0.1, buffer.numel()).to(torch.bfloat16))
    return stock


def build(
    family: str,
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    fused: bool = False,
    sharded: bool = False,
    extra_layer: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a checkpoint and return its directory; one that already lies there is kept.

    Args:
        fused: 3-D expert tensors instead of one per expert and projection.
        sharded: several files with an index.
        extra_layer: one more layer in the file than in the model, as DeepSeek-V3's prediction layer.
        overrides: config values.
    """
    directory = Path(directory)
    if (directory / "config.json").exists():
        return directory
    if extra_layer:
        overrides["num_nextn_predict_layers"] = 1
    stock = model(family, seed=seed, **overrides).to(dtype)
    stock.config.dtype = dtype
    for module in stock.modules():
        if getattr(module, "e_score_correction_bias", None) is not None:
            module.e_score_correction_bias = module.e_score_correction_bias.float()  # as DeepSeek-V3 stores it
    shard = {"max_shard_size": "60KB"} if sharded else {}
    stock.save_pretrained(directory, save_original_format=not fused, **shard)
    if extra_layer:
        _add_layer(directory, stock.config.num_hidden_layers)
    return directory


def load_stock(directory: str | Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """Stock transformers model from a checkpoint, eager experts, in eval mode."""
    import transformers

    loader = transformers.AutoModelForCausalLM
    return loader.from_pretrained(directory, dtype=dtype, experts_implementation="eager", **kwargs).eval()


def _add_layer(directory: Path, number: int) -> None:
    """Copy the last layer's tensors under the next layer number, into a shard of their own."""
    index_path = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if single.exists():
        first = load_file(single)
        single.unlink()
        save_file(first, directory / "model-00001.safetensors", metadata={"format": "pt"})
        weight_map = dict.fromkeys(first, "model-00001.safetensors")
    else:
        weight_map = json.loads(index_path.read_text())["weight_map"]
    marker = f"model.layers.{number - 1}."
    extra = {}
    for name, file in weight_map.items():
        if name.startswith(marker):
            extra[name.replace(marker, f"model.layers.{number}.")] = load_file(directory / file)[name].clone()
    save_file(extra, directory / "model-extra.safetensors", metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(extra, "model-extra.safetensors"))
    index_path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def rewrite(directory: str | Path, change: Any) -> None:
    """Apply `change(tensors) -> tensors` to the one file of an unsharded checkpoint."""
    file = Path(directory) / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file({name: t.contiguous() for name, t in change(tensors).items()}, file, metadata={"format": "pt"})


def dense(directory: str | Path) -> Path:
    """A model without experts."""
    import transformers

    directory = Path(directory)
    if not (directory / "config.json").exists():
        values = {**_COMMON, "hidden_size": 48, "intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 12}
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).save_pretrained(directory)
    return directory


def token_ids(batch: int = 2, length: int = 9, *, seed: int = 2) -> torch.Tensor:
    """Random token ids without specials, int64 `[batch, length]`; the default seed routes no token near a tie."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)
