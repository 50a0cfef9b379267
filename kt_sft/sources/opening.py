"""Opening experts in whatever kind of files they are, and the loop that packs all of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from kt_sft import env
from kt_sft.errors import GIB, FormatError, packing
from kt_sft.formats.checkpoint import CONTAINER, GGUF, Weights, gguf_sources
from kt_sft.formats.finite import is_finite
from kt_sft.formats.quantized_index import QuantizedIndex
from kt_sft.formats.tensor_errors import INCOMPLETE
from kt_sft.progress import progress_bar
from kt_sft.sources.gguf import GgufExperts
from kt_sft.sources.packed import PackedExperts
from kt_sft.sources.safetensors import SafetensorsExperts, find_layers

if TYPE_CHECKING:
    from kt_sft.models.expert_keys import KeyMap
    from kt_sft.models.layout import ExpertsSpec
    from kt_sft.sources.protocol import ExpertSource

logger = logging.getLogger(__name__)


def open_experts(
    weights: Weights,
    specs: Mapping[str, ExpertsSpec],
    *,
    key_map: KeyMap | None = None,
    weight_load: str = "auto",
    own: QuantizedIndex | None = None,
) -> ExpertSource:
    """Find every expert in files whose headers have been read.

    Args:
        weights: see `formats.checkpoint.open_weights`; taken over.
        specs: routed experts by module name.
        key_map: of the model; only safetensors need it.
        weight_load: the setting of this name.
        own: the model's own checkpoint, with which a container is compared.
    Raises:
        FormatError: experts missing, twice, of a wrong shape or type; a container of another model.
        UnsupportedModel: the family stores experts in a way that needs more than slicing.
    """
    if weights.kind == CONTAINER:
        open_own = None if own is None else partial(_of_checkpoint, own, key_map)
        made_of = [] if own is None else gguf_sources(own.source)
        return PackedExperts(weights, specs, weight_load=weight_load, open_original=open_own, own_files=made_of)
    return GgufExperts(weights, specs) if weights.kind == GGUF else _of_checkpoint(weights, key_map)


def _of_checkpoint(index: QuantizedIndex, key_map: KeyMap) -> SafetensorsExperts:
    return SafetensorsExperts(index, find_layers(index, key_map))


def check_own(own: QuantizedIndex, key_map: KeyMap) -> None:
    """Compare a model's own checkpoint with the model: shapes outside the experts, and the biases of these.

    With a quantizer present transformers does not compare shapes itself.

    Raises:
        FormatError: another shape, or a bias missing.
    """
    for key in own:
        shape = key_map.plain_shape(key)
        if shape is not None:
            own.expect(key, shape)
    missing = key_map.missing_biases(own)
    if missing:
        raise FormatError(
            own.source,
            "biases of the experts",
            expected=missing[0],
            found="no such tensor",
            remedy=INCOMPLETE,
        )


def check_biases(model: nn.Module, source: ExpertSource) -> None:
    """Look at the experts' biases, which are loaded before their weights and by transformers.

    Raises:
        FormatError: NaN or infinity in one.
    """
    for name in source.formats:
        experts = model.get_submodule(name)
        for bias in experts.spec.bias_shapes:
            parameter = experts.get_parameter(bias).detach()
            if parameter.device.type != "meta" and not is_finite(parameter):
                raise FormatError(
                    source.path, f"tensor {name}.{bias}", expected="finite numbers", found="NaN or infinity",
                    remedy="download the checkpoint again, or make it again: with these biases the model computes NaN",
                )  # fmt: skip


def stream_experts(model: nn.Module, source: ExpertSource) -> None:
    """Load every expert, one at a time; nothing but the packed copy stays in anonymous memory.

    Raises:
        FormatError: see `ExpertSource.load`; weights that cannot be packed.
    """
    counts = {name: model.get_submodule(name).num_experts for name in source.formats}
    total = sum(counts.values())
    done = 0
    with progress_bar("Packing experts", total, unit="expert", is_shown=env.local_rank() <= 0) as move:
        for name, count in counts.items():
            experts = model.get_submodule(name)
            for expert in range(count):
                with packing(source, name, expert):
                    source.load(experts, name, expert, slot=expert)
                done += 1
                move(done, total, name)
    source.close()
    packed_bytes = sum(model.get_submodule(name).packed_bytes for name in counts)
    logger.info("loaded %d experts of %d layers in %.2f GiB", total, len(counts), packed_bytes / GIB)
