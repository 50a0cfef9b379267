"""One adapter of every kind that can be trained, made by stock PEFT, and what the model computes with it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kt_sft.formats.gguf import GgufIndex
from kt_sft.integrations.gguf.tokenizer import read_tokenizer
from tests.helpers import gguf_files, gguf_models, tiny_models

SIZES = {  # whole blocks of 32 in every row of a GGUF file, and 2 inter != hidden
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 28, "num_attention_heads": 4, "head_dim": 16},
    "deepseek_v2": {"hidden_size": 64, "moe_intermediate_size": 28, "intermediate_size": 40},
    "deepseek_v3": {"hidden_size": 64, "moe_intermediate_size": 28, "intermediate_size": 40},
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True}


@dataclass(frozen=True)
class Case:
    """An adapter.

    Args:
        kinds: of kt_sft.adapters.kinds, that it holds.
        lora: arguments of LoraConfig.
        overrides: of the base model's config.
    """

    kinds: tuple[str, ...]
    lora: dict[str, Any]
    family: str = "qwen3_moe"
    overrides: dict[str, Any] = field(default_factory=dict)


CASES = {
    "attention": Case(("linear",), {"target_modules": ["q_proj", "o_proj"]}),
    "dense": Case(("linear",), {"target_modules": r".*layers\.0\.mlp\.(gate|up|down)_proj"}, "deepseek_v3"),
    "shared": Case(("linear",), {"target_modules": r".*shared_experts\.(gate|up|down)_proj"}, "deepseek_v3"),
    "experts": Case(("experts",), {"target_modules": [], "target_parameters": EXPERTS}),
    "router": Case(("router",), {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
    "router_by_name": Case(("router",), {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
    "router_linear": Case(("router",), {"target_modules": ["gate"]}, "deepseek_v2"),
    "router_linear_parameter": Case(
        ("router",), {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}, "deepseek_v2"
    ),
    "head": Case(("linear", "saved"), {"target_modules": ["lm_head"]}),
    "head_tied": Case(("tied_head", "saved"), {"target_modules": ["lm_head"]}, overrides=TIED),
    "embedding": Case(("embedding", "saved"), {"target_modules": ["embed_tokens"]}),
    "embedding_tied": Case(("embedding", "saved"), {"target_modules": ["embed_tokens"]}, overrides=TIED),
    "saved": Case(("linear", "saved"), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "saved_tied": Case(("saved",), {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, overrides=TIED),
    "saved_head_tied": Case(("saved",), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, overrides=TIED),
    "saved_both_tied": Case(
        ("saved",), {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, overrides=TIED
    ),
    "saved_as_one": Case(
        ("saved",),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        overrides=TIED,
    ),
    "tokens": Case(("tokens",), {"target_modules": ["q_proj"], "trainable_token_indices": [93, 7, 25]}),
    "tokens_tied": Case(
        ("tokens",), {"target_modules": ["q_proj"], "trainable_token_indices": [93, 7, 25]}, overrides=TIED
    ),
    "dora": Case(("dora",), {"target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "dora_embedding": Case(("dora", "embedding", "saved"), {"target_modules": ["embed_tokens"], "use_dora": True}),
    "bias": Case(("bias",), {"target_modules": ["q_proj"], "bias": "all"}, overrides=BIASED),
    "lora_bias": Case(("lora_bias",), {"target_modules": ["q_proj"], "lora_bias": True}, overrides=BIASED),
    "lora_bias_alone": Case(("lora_bias",), {"target_modules": ["q_proj"], "lora_bias": True}),
}


def base(case: Case, root: Path) -> Path:
    """The checkpoint that a case is trained on: values that bf16 has, stored in f32, so that a merge rounds nothing."""
    folder = root / "-".join([case.family, *case.overrides])
    if not folder.exists():
        sizes = SIZES[case.family]
        tiny_models.build(case.family, folder, dtype=torch.float32, sharded=True, **sizes, **case.overrides)
        values = gguf_models.tokenizer(json.loads((folder / "config.json").read_text())["vocab_size"])
        file = gguf_files.write(folder / "t.gguf", values, {"x": gguf_files.random_blocks("F32", (3,))})
        read_tokenizer(GgufIndex.from_path(file)).save_pretrained(folder)
        file.unlink()
    return folder


def make(name: str, root: Path) -> tuple[Path, Path]:
    """Base model and adapter of a case."""
    case = CASES[name]
    folder, adapter = base(case, root), root / name
    config = LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **case.lora)
    model = get_peft_model(tiny_models.load_stock(folder), config)
    randomise(model, model.peft_config["default"])
    model.save_pretrained(adapter)
    if name == "router_by_name":
        _as_transformers_4(adapter)
    return folder, adapter


def randomise(model: nn.Module, config: LoraConfig, seed: int = 3) -> None:
    """Everything that trains gets values that matter, exact in bf16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                is_factor = ".lora_" in name and "magnitude" not in name
                parameter.copy_((0.2 * noise if is_factor else parameter + 0.3 * noise).bfloat16())


def truth(name: str, folder: Path, adapter: Path, ids: Tensor) -> Tensor:
    """Logits of stock transformers with stock PEFT; where PEFT computes without a router's LoRA, of W + delta."""
    case, stock = CASES[name], tiny_models.load_stock(folder)
    if not name.startswith("router"):
        return PeftModel.from_pretrained(stock, adapter).eval()(ids).logits.detach()
    tensors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for key, a in tensors.items():
            if key.endswith("lora_A.weight"):
                module = stock.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                module.weight += 2 * tensors[key.replace("lora_A", "lora_B")] @ a
    assert case.kinds == ("router",)
    return stock(ids).logits.detach()


def _as_transformers_4(adapter: Path) -> None:
    """The router was a Linear layer then, and named like one."""
    file = adapter / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"target_modules": ["gate"], "target_parameters": None}))
    weights = adapter / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt"})
