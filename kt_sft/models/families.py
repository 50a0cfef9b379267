"""The families whose experts modules need a file of their own; docs/adding_a_model.md shows how one is added.

Such a file has `EXPERTS_CLASS`, the class name of the experts module, or with `IN_MODULE_LIST` of the elements of a
ModuleList that holds one module per expert; `experts_spec(module)`, which gives its
`ExpertsSpec` or None if the kernels cannot compute it; and, where the block around the experts must call them
differently, `adapt(block)`.
"""

from __future__ import annotations

from types import ModuleType

from torch import nn

from kt_sft.models import gpt_oss, llama4, small_thinker

FAMILIES: dict[str, ModuleType] = {family.EXPERTS_CLASS: family for family in (gpt_oss, llama4, small_thinker)}


def family_of(module: nn.Module) -> ModuleType | None:
    """The file that describes this experts module; None for those of the common kind, and for all other modules."""
    is_list = isinstance(module, nn.ModuleList) and len(module) > 0
    family = FAMILIES.get(type(module[0] if is_list else module).__name__)
    return family if getattr(family, "IN_MODULE_LIST", False) == is_list else None


def adapt_block(block: nn.Module, experts: nn.Module) -> None:
    """Change the block whose experts module is replaced, where its family needs that.

    Args:
        experts: transformers' module, which is leaving.
    """
    adapt = getattr(family_of(experts), "adapt", None)
    if adapt is not None:
        adapt(block)
