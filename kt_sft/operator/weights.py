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

import torch
from torch import Tensor

from kt_sft.config import KTConfig
from kt_sft.errors import ConfigError, FormatError, UnsupportedModel, unpackable
from kt_sft.formats.gguf import GgufIndex
from kt_sft.formats.gguf_expert_tensors import ROUTER_SCALE_ARCHITECTURES, count_experts
from kt_sft.formats.packed import PackedContainer
from kt_sft.integrations.transformers.converting import open_source
from kt_sft.integrations.transformers.memory_check import check_memory
from kt_sft.models.spec import ExpertsSpec
from kt_sft.nn.routed_experts import Matrices, RoutedExperts, WeightFormats
from kt_sft.ops.cpu_copy import check_storage
from kt_sft.residency.expert_map import Placement, logical_experts
from kt_sft.sources.gguf import GgufExperts
from kt_sft.sources.opening import ExpertSource, check_method, open_weight_path, weight_formats
from kt_sft.sources.packed import PackedExperts

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
    path: str, sizes: LayerSizes, placement: Placement, config: KTConfig, physical_to_logical_map: Tensor | None
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
        source, name, spec, config = _open_layer(path, sizes, config)
        stack.callback(source.close)
        logical = logical_experts(physical_to_logical_map, sizes.num_experts, spec.num_experts)
        experts = _empty(spec, placement, config, weight_formats(source, config)[name])
        if experts is None:
            return None
        for slot, expert in enumerate(placement.on_cpu):
            try:
                source.load(experts, name, logical[expert], slot=slot)
            except FormatError:
                raise
            except ValueError as error:
                raise unpackable(source, name, logical[expert], error, instead="use method BF16") from None
        return experts


class TensorExperts:
    """Experts in the tensors of a caller, as `kt_sft.convert` reads a source.

    Args:
        gate, up: `[experts, inter, hidden]`, of any floating point type and device.
        down: `[experts, hidden, inter]`.
    Raises:
        TypeError: no tensors.
        ValueError: a shape or type that does not fit.
    """

    formats: Mapping[str, tuple[str, str, str]] = {}

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, sizes: LayerSizes):
        for name, tensor in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, found {type(tensor).__name__}")
        self.path = Path("tensors")
        self.num_experts = gate.shape[0] if gate.dim() else 0
        into, out = (self.num_experts, sizes.inter, sizes.hidden), (self.num_experts, sizes.hidden, sizes.inter)
        for name, tensor, shape in (("gate_proj", gate, into), ("up_proj", up, into), ("down_proj", down, out)):
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise ValueError(
                    f"{name}: expected floating point {list(shape)}, found {tensor.dtype} {list(tensor.shape)}"
                )
        self._projections = (gate, up, down)

    def read(self, name: str, expert: int) -> Matrices:
        """gate, up and down of one expert in bf16 on the CPU."""
        for argument, tensor in zip(self.tensor_names(name, expert), self._projections, strict=True):
            check_storage(tensor, argument)
        gate, up, down = (t[expert].detach().to("cpu", torch.bfloat16).contiguous() for t in self._projections)
        return gate, up, down

    def tensor_names(self, name: str, expert: int) -> tuple[str, str, str]:
        """Of the arguments."""
        return "gate_proj", "up_proj", "down_proj"

    def close(self) -> None:
        """Nothing is open."""


def load_from_tensors(
    source: TensorExperts,
    sizes: LayerSizes,
    placement: Placement,
    config: KTConfig,
    physical_to_logical_map: Tensor | None,
) -> RoutedExperts | None:
    """The same from tensors, which are rounded to the weight format; nothing of them is kept.

    Raises:
        ConfigError: a method whose weights only files have.
        NotEnoughMemory: the layer does not fit.
        ValueError: a map that does not fit, or weights that cannot be packed.
    """
    if config.method in ("RAWINT4", "GGUF"):
        raise ConfigError(
            f"method {config.method}: its weights are taken from files as they are stored; use load_weights, or "
            "method BF16, INT8 or INT4"
        )
    logical = logical_experts(physical_to_logical_map, sizes.num_experts, source.num_experts)
    spec = ExpertsSpec(source.num_experts, sizes.hidden, sizes.inter)
    config = dataclasses.replace(config, weight_path=None)  # written to, if anything, and not loaded from
    experts = _empty(spec, placement, config, config.weight_format)
    for slot, expert in enumerate(placement.on_cpu if experts is not None else ()):
        try:
            experts.load_expert(slot, *source.read("", logical[expert]))
        except ValueError as error:
            raise unpackable(source, f"layer {sizes.layer_idx}", logical[expert], error, instead="use BF16") from None
    return experts


def _empty(
    spec: ExpertsSpec, placement: Placement, config: KTConfig, weight_format: WeightFormats
) -> RoutedExperts | None:
    if not placement.on_cpu:
        return None
    spec = dataclasses.replace(spec, num_experts=len(placement.on_cpu))
    check_memory({"layer": spec}, 0, config, {"layer": weight_format})
    return RoutedExperts(
        spec,
        weight_format=weight_format,
        group_size=config.int4_group_size,
        expert_activations=config.expert_activations,
        chunk_size=config.chunk_size,
    ).eval()


def _open_layer(path: str, sizes: LayerSizes, config: KTConfig) -> tuple[ExpertSource, str, ExpertsSpec, KTConfig]:
    """The source, the layer's name in it, its shape, and the settings with the group size of the files."""
    weights = open_weight_path(path)
    weights.close()
    if isinstance(weights, GgufIndex):
        name, spec = f"blk.{sizes.layer_idx}", _gguf_spec(weights, sizes)
        source: ExpertSource = GgufExperts(weights, {name: spec})
    elif isinstance(weights, PackedContainer):
        specs = {
            name: ExpertsSpec(layer.num_experts, layer.hidden, layer.inter, layer.activation)
            for name, layer in weights.manifest.layers.items()
        }
        if weights.manifest.group:
            config = dataclasses.replace(config, int4_group_size=weights.manifest.group)
        name = _layer_name(specs, sizes.layer_idx, path)
        spec = specs[name]
        if spec.activation == "clamped_swiglu":
            raise _incomplete(name, f"{spec.activation} in a container, which has neither its biases nor its limits")
        source = PackedExperts(path, specs, config)
    else:
        source, specs = _open_checkpoint(str(Path(path).resolve()), _marks(Path(path)))
        name = _layer_name(specs, sizes.layer_idx, path)
        spec = specs[name]
        if group := getattr(source, "int4_group", None) if config.method == "RAWINT4" else None:
            config = dataclasses.replace(config, int4_group_size=group)
    check_method(source, config)
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
    return source, name, spec, config


def _incomplete(name: str, found: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"experts of {name}", expected="experts without biases", found=found, remedy="use kt_sft.load_model"
    )


@functools.lru_cache(maxsize=1)
def _open_checkpoint(path: str, marks: tuple) -> tuple[ExpertSource, dict[str, ExpertsSpec]]:
    """Opened once for all layers of a model: that builds the model on the meta device."""
    source, specs, _ = open_source(path)
    return source, specs


def _marks(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """What tells that a file was written since."""
    stats = ((file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file())
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


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
