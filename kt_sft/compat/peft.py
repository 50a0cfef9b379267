"""Names of PEFT that lie below its documented packages `peft` and `peft.utils`, each with its release.

Of 0.18, which this release supports; what another one calls differently gets its answer here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import peft

# LoRA of a layer since 0.1, of a layer of each kind, and since 0.17 of one parameter of a module.
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper

# Since 0.3 and 0.5: what injects adapters and what it puts in; since 0.6 and 0.8: whether a config means a module, and
# which adapters a merge takes.
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    check_target_module_exists,
)

# Since 0.14: which key of a config's patterns a name matches.
from peft.utils.other import get_pattern_key

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "LoraEmbedding",
    "LoraLayer",
    "LoraLinear",
    "ParamWrapper",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "get_pattern_key",
]

RELEASE = peft.__version__  # the release that runs


def every_linear(config: LoraConfig, model: nn.Module) -> set[str]:
    """The modules that `all-linear` in a config means; since 0.8. The config is written to."""
    return set(_maybe_include_all_linear_layers(config, model).target_modules)


def custom_layers(config: LoraConfig) -> Sequence[type]:
    """Classes that the user has registered for LoRA beside PEFT's own; since 0.12."""
    return tuple(getattr(config, "_custom_modules", None) or ())


def has_exchanged_widths(wrapper: ParamWrapper) -> bool:
    """Whether a parameter's two widths are exchanged in its factors; since 0.19, set by transformers before."""
    return getattr(wrapper, "_did_swap_in_out_features", False)


def check_forward_arguments(layer: LoraLayer, x: Any, *args: Any, **kwargs: Any) -> None:
    """Raise, as PEFT does, for arguments of one forward that a layer cannot honour; since 0.10."""
    layer._check_forward_args(x, *args, **kwargs)


@contextmanager
def disabled(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    """Within it, layers compute without adapters; since 0.6.

    PEFT's own switch would also set requires_grad, which the run may have set otherwise.
    """
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, is_disabled in zip(layers, before, strict=True):
            layer._disable_adapters = is_disabled
