"""Whether a model fits into main memory, asked while its weights are still in the files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kt_sft import env, memory
from kt_sft.formats.packed import is_container
from kt_sft.native import native
from kt_sft.sources.cache import uses_cache
from kt_sft.sources.packed import copies

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kt_sft.config import KTConfig
    from kt_sft.models.spec import ExpertsSpec
    from kt_sft.nn.routed_experts import WeightFormats

logger = logging.getLogger(__name__)


def check_memory(
    specs: Mapping[str, ExpertsSpec], rest_bytes: int, config: KTConfig, formats: Mapping[str, WeightFormats]
) -> None:
    """Raise unless the experts fit beside the rest; warn where mapped experts will be read again and again.

    Args:
        specs: routed experts by module name.
        rest_bytes: everything else that stays in main memory.
        formats: what each module will hold.
    Raises:
        NotEnoughMemory: needed and available bytes, and the formats that would fit.
    """
    methods = [method for method in ("INT8", "INT4") if method != config.method]
    smaller = {
        method: memory_needed(specs, rest_bytes, config, dict.fromkeys(specs, method.lower())) for method in methods
    }
    available, wanted = memory.available_memory(), memory_needed(specs, rest_bytes, config, formats)
    memory.check(wanted, available, smaller)
    if warning := memory.mapped_shortage(wanted, available):
        logger.warning(warning)


def memory_needed(
    specs: Mapping[str, ExpertsSpec], rest_bytes: int, config: KTConfig, formats: Mapping[str, WeightFormats]
) -> memory.MemoryEstimate:
    """What a model needs; arguments as those of `check_memory`."""
    is_mapped = (uses_cache(config) or _is_packed(config)) and not copies(config)
    packed_bytes = native().ExpertStore.packed_bytes_for
    sizes = [
        packed_bytes(spec.num_experts, spec.hidden, spec.inter, formats[name], config.int4_group_size)
        for name, spec in specs.items()
    ]
    return memory.estimate(specs, sizes, rest_bytes, ranks=env.local_world_size(), is_mapped=is_mapped)


def check_memory_of_all(needed: Sequence[memory.MemoryEstimate], what: str) -> None:
    """Raise unless several models fit beside one another.

    Args:
        what: names them in messages.
    Raises:
        NotEnoughMemory: needed bytes of all of them, and available bytes.
    """
    experts, rest = (sum(getattr(one, name) for one in needed) for name in ("experts_bytes", "rest_bytes"))
    staging = max(one.staging_bytes for one in needed)  # they are loaded one after the other
    together = memory.MemoryEstimate(experts, staging, rest, needed[0].ranks)
    memory.check(together, memory.available_memory(), what=what)


def bytes_outside_experts(model: PreTrainedModel, specs: Mapping[str, ExpertsSpec]) -> int:
    """Bytes of all parameters and buffers outside the experts."""
    outside = (
        t for name, t in [*model.named_parameters(), *model.named_buffers()] if name.rpartition(".")[0] not in specs
    )
    return sum(tensor.numel() * tensor.element_size() for tensor in outside)


def uses_main_memory(device_map: dict[str, Any] | str | None) -> bool:
    """Whether weights outside the experts stay in main memory under this device map."""
    if not isinstance(device_map, dict):
        return device_map in (None, "cpu")
    return any(str(device) == "cpu" for device in device_map.values())


def _is_packed(config: KTConfig) -> bool:
    return config.weight_path is not None and is_container(config.weight_path)
