"""Tiny checkpoints in the public quantised formats, each with a bf16 twin that holds the very same numbers.

FP8: config.json and tensors as DeepSeek-V3 publishes them (e4m3 `weight`, f32 `weight_scale_inv` per block).
INT4: as Kimi-K2-Thinking publishes them (compressed-tensors, pack-quantized, symmetric groups, experts only).
MXFP4: as gpt-oss publishes them (blocks of 32 e2m1 numbers along the inputs, e8m0 scales, experts only).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
Tensors = dict[str, Tensor]


def fp8_checkpoint(source: Path, target: Path, block: tuple[int, int] = (16, 32)) -> tuple[Path, Path]:
    """Every matrix but embeddings, head, norms and router in FP8; returns (fp8 directory, bf16 twin)."""

    def quantize(key: str, w: Tensor) -> tuple[Tensors, Tensor] | None:
        if w.dim() < 2 or re.search(r"embed_tokens|lm_head|norm|mlp\.gate\.|block_sparse_moe\.gate\.", key):
            return None
        scale = block_max(w, block) / 448
        full = expand(scale, block, w.shape)
        q = (w.float() / full).to(torch.float8_e4m3fn)
        return {key: q, f"{key}_scale_inv": scale}, (q.float() * full).bfloat16()

    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
    }
    return _convert(source, target, config, quantize)


def int4_checkpoint(source: Path, target: Path, group: int = 32) -> tuple[Path, Path]:
    """The routed experts in INT4 with bf16 scales; returns (int4 directory, bf16 twin)."""

    def quantize(key: str, w: Tensor) -> tuple[Tensors, Tensor] | None:
        if not re.search(r"experts\.\d+\.\w+\.weight$", key):
            return None
        scale = (block_max(w, (1, group)) / 7).bfloat16()
        full = expand(scale.float(), (1, group), w.shape)
        q = (w.float() / full).round().clamp(-8, 7).int()
        stem = key.removesuffix(".weight")
        parts = {"packed": pack_int4(q), "scale": scale, "shape": torch.tensor(w.shape, dtype=torch.int32)}
        return {f"{stem}.weight_{name}": part for name, part in parts.items()}, (q.float() * full).bfloat16()

    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    }
    return _convert(source, target, config, quantize)


def mxfp4_checkpoint(source: Path, target: Path) -> tuple[Path, Path]:
    """The routed experts of gpt-oss, `[experts, in, out]`, in MXFP4; returns (mxfp4 directory, bf16 twin)."""
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    numbers = torch.cat([numbers, -numbers])

    def quantize(key: str, w: Tensor) -> tuple[Tensors, Tensor] | None:
        if not re.search(r"experts\.\w+_proj$", key):
            return None
        groups = w.mT.float().unflatten(-1, (-1, 32))
        exponent = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30).log2().floor() - 2
        codes = (groups[..., None] / exponent.exp2()[..., None] - numbers).abs().argmin(-1)
        parts = {"blocks": (codes[..., ::2] | codes[..., 1::2] << 4).byte(), "scales": (exponent[..., 0] + 127).byte()}
        value = (numbers[codes] * exponent.exp2()).flatten(-2).mT.contiguous().bfloat16()
        return {f"{key}_{name}": part.contiguous() for name, part in parts.items()}, value

    return _convert(source, target, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, quantize)


def block_max(w: Tensor, block: tuple[int, int]) -> Tensor:
    """Largest magnitude of each block, f32 `[..., ceil(n / block[0]), ceil(k / block[1])]`, at least 1e-6."""
    n, k = w.shape[-2:]
    padded = torch.nn.functional.pad(w.float().abs(), (0, -k % block[1], 0, -n % block[0]))
    tiles = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    return tiles.amax((-1, -3)).clamp(min=1e-6)


def expand(scale: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """A scale for every element."""
    full = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return full[..., : shape[-2], : shape[-1]]


def pack_int4(q: Tensor) -> Tensor:
    """int32 words of eight values, the first lowest, as q + 8."""
    words = ((q.long() + 8).reshape(q.shape[0], -1, 8) << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words < 1 << 31, words, words - (1 << 32)).to(torch.int32)


def _convert(
    source: Path, target: Path, quantization: dict, quantize: Callable[[str, Tensor], tuple[Tensors, Tensor] | None]
) -> tuple[Path, Path]:
    quantized, twin = target / "quantized", target / "twin"
    for folder in (quantized, twin):
        shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    weight_map: dict[str, str] = {}
    for file in source.glob("*.safetensors"):
        stored: Tensors = {}
        plain: Tensors = {}
        for key, w in load_file(file).items():
            parts, value = quantize(key, w) or ({key: w}, w)
            stored.update(parts)
            plain[key] = value
        weight_map.update(dict.fromkeys(stored, file.name))
        save_file(stored, quantized / file.name, metadata={"format": "pt"})
        save_file(plain, twin / file.name, metadata={"format": "pt"})
    if (source / INDEX_NAME).exists():
        (quantized / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return quantized, twin
