"""Packed containers that the first load of a checkpoint leaves behind for the later ones."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kt_sft import env
from kt_sft.convert.plan import name_of, plan_conversion
from kt_sft.convert.run import convert
from kt_sft.errors import OutputError
from kt_sft.formats.packed import PackedContainer
from kt_sft.formats.packed_manifest import FORMATS
from kt_sft.progress import progress_bar
from kt_sft.sources.packed import PackedExperts

if TYPE_CHECKING:
    from kt_sft.config import KTConfig
    from kt_sft.models.layout import ExpertsSpec
    from kt_sft.sources.protocol import ExpertSource

logger = logging.getLogger(__name__)


def through_cache(
    source: ExpertSource, specs: Mapping[str, ExpertsSpec], config: KTConfig, model_type: str
) -> ExpertSource:
    """The container of this source, format and layout in `config.weight_cache`, written now if it is not there.

    Of several processes one writes and the others wait. Where it cannot be written, a warning says so and the source
    comes back as it is: the experts are then packed in memory.

    Raises:
        FormatError: the source is damaged, or the container.
    """
    if not uses_cache(config) or source.is_packed:
        if config.weight_cache is not None and not uses_cache(config):
            logger.warning("weight_cache: no effect with method %s, which is not packed into containers", config.method)
        return source
    assert config.weight_cache is not None
    group = config.int4_group_size
    plan = plan_conversion(source, specs, "", config.format, group, model_type)
    kind = name_of(plan.format, plan.group).replace(" in groups of ", "g")
    folder = Path(config.weight_cache).expanduser() / f"{model_type}-{kind}-{plan.identity[:16]}"
    plan = dataclasses.replace(plan, output=folder)
    try:
        with progress_bar(
            "Packing experts", plan.num_experts, unit="expert", is_shown=env.local_rank() <= 0
        ) as progress:
            manifest = convert(source, plan, wait=True, progress=progress)
    except OutputError as error:
        logger.warning("weight_cache: experts are packed in memory instead: %s", error)
        return source
    container = PackedContainer(folder, manifest)
    return PackedExperts(container, specs, weight_load=config.weight_load, original=source)


def uses_cache(config: KTConfig) -> bool:
    """Whether a checkpoint is loaded through a container in the cache."""
    return config.weight_cache is not None and config.format in FORMATS
