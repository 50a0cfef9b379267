"""Fine-tuning of mixture-of-experts models with the routed experts in CPU kernels.

An entry point imports this package in every torch process, so importing it does no work:
the public names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Canary": "kt_sft.integrations.canary.callback",
    "KTConfig": "kt_sft.config",
    "KTMoEWrapper": "kt_sft.operator.moe",
    "load_model": "kt_sft.integrations.transformers.loading",
    "get_peft_model": "kt_sft.integrations.peft",
    "load_adapter": "kt_sft.integrations.peft",
}

if TYPE_CHECKING:
    from kt_sft.config import KTConfig
    from kt_sft.integrations.canary.callback import Canary
    from kt_sft.integrations.peft import get_peft_model, load_adapter
    from kt_sft.integrations.transformers.loading import load_model
    from kt_sft.operator.moe import KTMoEWrapper

__all__ = ["Canary", "KTConfig", "KTMoEWrapper", "__version__", "get_peft_model", "load_adapter", "load_model"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'kt_sft' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
