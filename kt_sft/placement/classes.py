"""What the class names in rule files mean: ours, and those of ktransformers' rule files, which name its operators."""

from __future__ import annotations

import re

STOCK, LINEAR, PACKED_LINEAR, EXPERTS = "stock", "linear", "packed linear", "experts"

# What `replace: class:` may say, beside the operators below.
TARGETS = {"default": STOCK, "RoutedExperts": EXPERTS, "PackedLinear": PACKED_LINEAR}

# Operators of ktransformers: file of its package `operators` -> (class name, what we have in its place). Wrappers of
# attention, router, norms and whole models compute what transformers' own modules compute.
_OPERATORS = {
    "experts": ((r"K\w*Experts\w*", EXPERTS), (r"K\w*(MoE|Moe)\w*", STOCK)),
    "linear": ((r"KTransformersLinear", LINEAR),),
    "rope": ((r"\w*Rotary\w*", STOCK),),
    "attention": ((r"\w*(Attention|attn)\w*", STOCK),),
    "balance_serve_attention": ((r"\w*(Attention|attn)\w*", STOCK),),
    "gate": ((r"KMoEGate\w*", STOCK),),
    "layernorm": ((r"\w*Norm\w*", STOCK),),
    "mlp": ((r"\w*MLP\w*", STOCK),),
    "models": ((r"K\w*(Model|ForCausalLM)\w*", STOCK),),
}
KNOWN_TARGETS = (
    *TARGETS,
    "ktransformers.operators.experts.KTransformersExperts",
    "ktransformers.operators.linear.KTransformersLinear",
    "ktransformers.operators.RoPE.RotaryEmbedding",
)

# Operators that compute experts on a GPU; here the CPU does.
GPU_EXPERTS = ("KExpertsTorch", "KExpertsMarlin")
# Operators that compute one module: those that we have something for, and why not the others.
OPERATORS = {
    "KLinearTorch": LINEAR,
    "KLinearCPUInfer": LINEAR,
    "KExpertsCPU": EXPERTS,
    "KSFTExpertsCPU": EXPERTS,
    "KSFTRouteExpertsCPU": EXPERTS,
    **dict.fromkeys(GPU_EXPERTS, EXPERTS),
}
REFUSED_OPERATORS = {
    r"[KV]Linear(Marlin|FP8|Q8)\w*": "quantised linear layers on a GPU are not computed here; use KLinearTorch",
}

# Class names in ktransformers' copies of model code -> transformers'.
_MODEL_CLASSES = {
    "deepseekv2yarnrotaryembedding": "deepseekv2rotaryembedding",
    "deepseekv3yarnrotaryembedding": "deepseekv3rotaryembedding",
    "moegate": "deepseekv3topkrouter",
    "qwen3moemoeblock": "qwen3moesparsemoeblock",
}


def target_of(name: str) -> str | None:
    """What `replace: class:` asks for; None: a name that nobody knows."""
    parts = name.split(".")
    for ours, target in TARGETS.items():
        if parts[-1] == ours and (len(parts) == 1 or parts[0] == "kt_sft"):
            return target
    if parts[:2] == ["ktransformers", "operators"] and len(parts) == 4:
        for pattern, target in _OPERATORS.get(parts[2].lower(), ()):
            if re.fullmatch(pattern, parts[3]):
                return target
    return None


def refused_operator(name: str) -> str | None:
    """Why an operator is refused; None if it is not."""
    return next((why for pattern, why in REFUSED_OPERATORS.items() if re.fullmatch(pattern, name)), None)


def is_class(module: object, name: str) -> bool:
    """Whether a module is of a class, given by name: a class of transformers, torch or ktransformers' model code.

    The last part decides, in any case: `torch.nn.Linear`, `Linear` and `torch.nn.modules.linear.Linear` are the same.
    """
    wanted = name.rpartition(".")[2].lower()
    wanted = _MODEL_CLASSES.get(wanted, wanted)
    return any(kind.__name__.lower() == wanted for kind in type(module).__mro__)
