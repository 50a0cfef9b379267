"""What LLaMA-Factory's `init_adapter` calls instead of PEFT when the model has our experts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import peft
from torch import nn

from kt_sft.integrations import peft as kt_peft
from kt_sft.integrations.peft.targets import router_linears


def get_peft_model(model: nn.Module, peft_config: peft.PeftConfig, **kwargs: Any) -> nn.Module:
    """PEFT's get_peft_model; on our models with LoRA on the routed experts, if the run asks for it."""
    build = kt_peft.get_peft_model if hasattr(model, "kt_config") else peft.get_peft_model
    return build(model, peft_config, **kwargs)


class PeftModelLoader:
    """Stands for peft.PeftModel in LLaMA-Factory's adapter module, which uses nothing of it but from_pretrained."""

    @staticmethod
    def from_pretrained(model: nn.Module, adapter: str, **kwargs: Any) -> nn.Module:
        """PEFT's from_pretrained; on our models the adapter's expert LoRA is bound to the kernels."""
        load = kt_peft.load_adapter if hasattr(model, "kt_config") else peft.PeftModel.from_pretrained
        return load(model, adapter, **kwargs)


def count_parameters(model: nn.Module, stock: Callable[[nn.Module], tuple[int, int]]) -> tuple[int, int]:
    """(trainable, all) parameters of any model; ours do not show all expert weights as parameters."""
    return kt_peft.count_parameters(model) if hasattr(model, "kt_config") else stock(model)


def is_export(model_args: Any, is_trainable: bool) -> bool:
    """Whether the model is loaded to be exported."""
    return not is_trainable and getattr(model_args, "export_dir", None) is not None


@contextlib.contextmanager
def merging(model_args: Any, finetuning_args: Any, is_trainable: bool) -> Iterator[None]:
    """Within it, `init_adapter` merges adapters only where that is meant: for export, and below a new adapter.

    Its `use_kt` branch is the one that keeps an adapter apart: merging would repack every expert, and chat needs no
    merged weights.
    """
    merge = is_export(model_args, is_trainable) or (is_trainable and finetuning_args.create_new_adapter)
    if not getattr(model_args, "kt_active", False) or merge:
        yield
        return
    model_args.use_kt = True
    try:
        yield
    finally:
        model_args.use_kt = False


def without_routers(model: nn.Module, module_names: list[str]) -> list[str]:
    """Drop names that only routers bear, as `gate` of DeepSeek-V2: LoRA there would train the routing."""
    routers = set(router_linears(model))
    if not routers:
        return module_names
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    others = {name.rpartition(".")[2] for name in linears - routers}
    return [name for name in module_names if name in others]
