"""Weights of one layer into the native layer: from a checkpoint, a GGUF file, a packed container or tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kt_sft import memory
from kt_sft.config import KTConfig
from kt_sft.errors import FormatError, UnsupportedModel, packing
from kt_sft.formats.checkpoint import GGUF, SAFETENSORS, kind_at, open_weights
from kt_sft.formats.gguf import GgufIndex
from kt_sft.formats.gguf_expert_tensors import ROUTER_SCALE_ARCHITECTURES, count_experts
from kt_sft.formats.unchanged_files import marks
from kt_sft.models.layout import ExpertsSpec
from kt_sft.nn.routed_experts import RoutedExperts
from kt_sft.residency.expert_map import ExpertMap, logical_experts
from kt_sft.sources.opening import open_experts
from kt_sft.sources.protocol import ExpertSource
from kt_sft.sources.tensors import TensorExperts

# Layers of one model share an open checkpoint, which one load at a time reads and closes.
_files_lock = threading.Lock()
_OTHER_MODEL = "correct the sizes or weight_path"


@dataclass(frozen=True)
class LayerSizes:
    """What the caller says of a layer; `num_experts` counts physical ones."""

    layer_idx: int
    num_experts: int
    hidden: int
    inter: int


def load_from_path(
    path: str, sizes: LayerSizes, expert_map: ExpertMap, config: KTConfig, physical_to_logical_map: Tensor | None
) -> RoutedExperts | None:
    """The experts of one layer, those on a GPU left out; None if all are there.

    Args:
        path: a checkpoint directory with config.json, a GGUF file or a directory with one, or a packed container.
    Raises:
        FormatError: files missing or damaged, no such layer, other sizes.
        ConfigError: the files do not have what `config.method` needs.
        NotEnoughMemory: the layer does not fit.
        UnsupportedModel: experts that the kernels cannot compute without the rest of the model.
        ValueError: a map that does not fit.
    """
    with _files_lock, contextlib.ExitStack() as stack:
        source, name, spec = _open_layer(path, sizes, config)
        stack.callback(source.close)
        return _load(source, name, spec, sizes, expert_map, config, physical_to_logical_map)


def load_from_tensors(
    source: TensorExperts,
    sizes: LayerSizes,
    expert_map: ExpertMap,
    config: KTConfig,
    physical_to_logical_map: Tensor | None,
) -> RoutedExperts | None:
    """The same from tensors, which are rounded to the method's format; nothing of them is kept.

    Raises:
        ConfigError: a method whose weights only files have.
        NotEnoughMemory: the layer does not fit.
        ValueError: a map that does not fit, or weights that cannot be packed.
    """
    (name,) = source.formats
    return _load(source, name, source.spec, sizes, expert_map, config, physical_to_logical_map)


def _load(
    source: ExpertSource,
    name: str,
    spec: ExpertsSpec,
    sizes: LayerSizes,
    expert_map: ExpertMap,
    config: KTConfig,
    physical_to_logical_map: Tensor | None,
) -> RoutedExperts | None:
    group = _group(source, config)
    formats = source.native_formats(name, config.method, group)
    logical = logical_experts(physical_to_logical_map, sizes.num_experts, spec.num_experts)
    if not expert_map.on_cpu:
        return None
    spec = dataclasses.replace(spec, num_experts=len(expert_map.on_cpu))
    memory.check_experts({name: spec}, 0, {name: formats}, group, method=config.method, is_mapped=source.is_mapped)
    experts = RoutedExperts(
        spec,
        formats=formats,
        group_size=group,
        expert_activations=config.expert_activations,
        chunk_size=config.chunk_size,
    ).eval()
    for slot, expert in enumerate(expert_map.on_cpu):
        with packing(source, name, logical[expert]):
            source.load(experts, name, logical[expert], slot=slot)
    return experts


def _group(source: ExpertSource, config: KTConfig) -> int:
    """Weights that share a scale: as they are stored where they are not rounded anew; the caller has no word for it."""
    is_kept = source.is_packed or config.method == "RAWINT4"
    return source.int4_group if is_kept and source.int4_group else config.int4_group_size


def _open_layer(path: str, sizes: LayerSizes, config: KTConfig) -> tuple[ExpertSource, str, ExpertsSpec]:
    """The source, the layer's name in it, and its shape."""
    folder = Path(path)
    if kind_at(folder) == SAFETENSORS and folder.is_dir():
        source, specs = _open_checkpoint(str(folder.resolve()), tuple(sorted(marks(folder).items())))
        name = _layer_name(specs, sizes.layer_idx, path)
    else:
        weights = open_weights(path)
        if weights.kind == GGUF:
            name = f"blk.{sizes.layer_idx}"
            specs = {name: _gguf_spec(weights, sizes)}
        else:
            specs = {
                name: ExpertsSpec(layer.num_experts, layer.hidden, layer.inter, layer.activation)
                for name, layer in weights.manifest.layers.items()
            }
            name = _layer_name(specs, sizes.layer_idx, path)
            if (activation := specs[name].activation) == "clamped_swiglu":
                raise _incomplete(name, f"{activation} in a container, which has neither its biases nor its limits")
        source = open_experts(weights, specs, weight_load=config.weight_load)
    spec = specs[name]
    if (spec.hidden, spec.inter) != (sizes.hidden, sizes.inter):
        raise FormatError(
            path,
            f"experts of {name}",
            expected=f"hidden_size {sizes.hidden}, moe_intermediate_size {sizes.inter}",
            found=f"{spec.hidden}, {spec.inter}",
            remedy=_OTHER_MODEL,
        )
    if spec.has_bias:
        raise _incomplete(name, "biases")
    return source, name, spec


def _incomplete(name: str, found: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"experts of {name}", expected="experts without biases", found=found, remedy="use kt_sft.load_model"
    )


@functools.lru_cache(maxsize=1)
def _open_checkpoint(path: str, marks: tuple) -> tuple[ExpertSource, dict[str, ExpertsSpec]]:
    """Opened once for all layers of a model: that builds the model on the meta device.

    The one place where the operator needs transformers, which knows what the tensors of a checkpoint are called.
    """
    from kt_sft.integrations.transformers.converting import open_source

    source, specs, _ = open_source(path)
    return source, specs


def _gguf_spec(index: GgufIndex, sizes: LayerSizes) -> ExpertsSpec:
    """As the caller says, with the number of experts that the file has."""
    count = count_experts(index, sizes.layer_idx, sizes.num_experts)
    has_router_scale = index.text("general.architecture") in ROUTER_SCALE_ARCHITECTURES
    return ExpertsSpec(count, sizes.hidden, sizes.inter, has_router_scale=has_router_scale)


def _layer_name(specs: Mapping[str, ExpertsSpec], layer_idx: int, path: str) -> str:
    """The experts module of a layer, by the first number in its name."""
    numbers = {name: int(found[1]) for name in specs if (found := re.search(r"\.(\d+)(?:\.|$)", name))}
    names = [name for name, number in numbers.items() if number == layer_idx]
    if len(names) != 1:
        layers = sorted(set(numbers.values()))
        found = f"{len(names)} modules" if names else f"layers {layers[0]} to {layers[-1]}" if layers else "none"
        raise FormatError(
            path, f"experts of layer {layer_idx}", expected="one module", found=found, remedy="correct layer_idx"
        )
    return names[0]
