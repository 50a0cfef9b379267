"""Random checkpoints of real shapes, written a layer at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

_EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.")


def deepseek_v2_lite(layers: int) -> transformers.PreTrainedConfig:
    """One dense layer and `layers` MoE layers of DeepSeek-V2-Lite's sizes."""
    return transformers.DeepseekV2Config(
        hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2,
        num_experts_per_tok=6, num_hidden_layers=1 + layers, first_k_dense_replace=1, vocab_size=102400,
        num_attention_heads=16, num_key_value_heads=16, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, topk_method="greedy", n_group=1, topk_group=1,
        max_position_embeddings=4096, dtype=torch.bfloat16, architectures=["DeepseekV2ForCausalLM"],
    )  # fmt: skip


def qwen3_30b(layers: int, vocab_size: int = 32000) -> transformers.PreTrainedConfig:
    """`layers` layers of Qwen3-30B-A3B's sizes."""
    return transformers.Qwen3MoeConfig(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        num_hidden_layers=layers, vocab_size=vocab_size, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], max_position_embeddings=4096,
        tie_word_embeddings=False, dtype=torch.bfloat16, architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip


def write_checkpoint(folder: Path, config: transformers.PreTrainedConfig, kind: str = "bf16") -> int:
    """One file per MoE layer and one for all else; bytes of the experts.

    Args:
        kind: of the experts: `bf16`, or `fp8` as DeepSeek-V3 has it, e4m3 with a scale per block of 128 x 128.
    """
    folder.mkdir(parents=True)
    if kind == "fp8":
        config.quantization_config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config.save_pretrained(folder)
    config.quantization_config = None
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    weight_map, expert_bytes = {}, 0
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        values = torch.empty(shape, dtype=torch.float32).normal_(generator=generator)
        return values.mul_(shape[-1] ** -0.5).to(torch.bfloat16)

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    others, layers = {}, []
    for name, parameter in model.named_parameters():
        if match := _EXPERTS.match(name):
            layers.append(int(match[1]))
        else:
            others[name] = random(*parameter.shape) if parameter.dim() > 1 else torch.ones(parameter.shape).bfloat16()
    save("model-others.safetensors", others)
    hidden, inter = config.hidden_size, config.moe_intermediate_size
    count = getattr(config, "n_routed_experts", None) or config.num_experts
    for layer in dict.fromkeys(layers):
        tensors = {}
        for expert in range(count):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            for name, shape in (("gate", (inter, hidden)), ("up", (inter, hidden)), ("down", (hidden, inter))):
                tensors |= stored(f"{prefix}.{name}_proj.weight", random(*shape), kind)
        expert_bytes += sum(tensor.nbytes for tensor in tensors.values())
        save(f"model-layer-{layer:02d}.safetensors", tensors)
    content = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return expert_bytes


def stored(key: str, w: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """A matrix as the checkpoint has it; both sides are multiples of 128."""
    if kind == "bf16":
        return {key: w}
    blocks = w.float().view(w.shape[0] // 128, 128, w.shape[1] // 128, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    q = (blocks / scale[:, None, :, None]).view(w.shape).to(torch.float8_e4m3fn)
    return {key: q, f"{key}_scale_inv": scale}
