"""Tiny random mixture-of-experts checkpoints, one per family, written as the hub's are: safetensors, per-expert keys.

Sizes are no multiples of a kernel tile and 2 * inter != hidden, so that a swapped axis or a transposed weight cannot
go unnoticed. Stock models here run transformers' eager experts: grouped_mm wants rows of whole 16 bytes and no float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kt_sft.integrations.transformers.auto_class import auto_class
from tests.helpers import families
from tests.helpers.family_parts import COMMON, VOCAB, composite

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3")  # of the tests that go deep; families.py has all


def config(family: str, **overrides: Any) -> Any:
    """transformers config of the tiny member; `overrides` replace values of it."""
    import transformers

    entry = families.FAMILIES[family]
    values = {**entry.values, **overrides}
    values = composite(values) if "text_config" in values else {**COMMON, **values}
    return getattr(transformers, entry.config_class)(**values)


def model(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """Stock transformers model with random weights that are exact in bf16, held in float32, in eval mode.

    Weights are larger than transformers' initialisation, so that routing is decided and every expert matters.
    """
    import transformers

    torch.manual_seed(seed)
    settings = config(family, **overrides)
    settings._experts_implementation = "eager"
    stock = getattr(transformers, families.FAMILIES[family].model_class)(settings).float().eval()
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5 if "embed" not in name else 1.0)
            parameter.copy_(parameter.to(torch.bfloat16))
        for name, buffer in stock.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
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
        if isinstance(getattr(module, "e_score_correction_bias", None), torch.Tensor):
            if isinstance(module.e_score_correction_bias, torch.nn.Parameter):  # ERNIE's is trained
                continue
            module.e_score_correction_bias = module.e_score_correction_bias.float()  # as DeepSeek-V3 stores it
    shard = {"max_shard_size": "60KB"} if sharded else {}
    stock.save_pretrained(directory, save_original_format=not fused, **shard)
    changes = families.FAMILIES[family].config_json
    if changes:
        file = directory / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    if extra_layer:
        _add_layer(directory, stock.config.num_hidden_layers)
    return directory


def load_stock(directory: str | Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """Stock transformers model from a checkpoint, eager experts, in eval mode."""
    import transformers

    loader = auto_class(transformers.AutoConfig.from_pretrained(directory))
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
        values = {**COMMON, "hidden_size": 48, "intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 12}
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).save_pretrained(directory)
    return directory


def token_ids(batch: int = 2, length: int = 9, *, seed: int = 2) -> torch.Tensor:
    """Random token ids without specials, int64 `[batch, length]`; the default seed routes no token near a tie."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)
