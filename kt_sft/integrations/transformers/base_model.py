"""What adapters have to know of the model they belong to, from its directory or from a model that is in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from kt_sft.adapters.model import BaseModel
from kt_sft.compat.transformers import revert_weight_conversion
from kt_sft.errors import ConfigError, FormatError
from kt_sft.integrations.gguf.model import is_gguf_model
from kt_sft.integrations.transformers.opened import OpenedModel
from kt_sft.models.expert_keys import KeyMap, LayerSource
from kt_sft.models.layout import ExpertsSpec
from kt_sft.models.routers import find_routers
from kt_sft.models.spec import find_experts, iter_routed_experts
from kt_sft.models.unwrapped import is_of_adapter, plain_modules, plain_name
from kt_sft.nn.packed_linear import PackedLinear


def find_base_model(
    name: str | os.PathLike[str] | None, *, adapter: object = "adapter", trust_remote_code: bool = False
) -> BaseModel:
    """Of a directory, hub name or GGUF file; only config.json, or the metadata, is read.

    Args:
        adapter: names the adapter in messages.
        trust_remote_code: whether code beside config.json may run.
    Raises:
        ConfigError: no name, or nothing there.
        FormatError: a damaged config.json.
        UnsupportedModel: no routed experts, or a model or experts that are not known.
    """
    if name is None:
        raise ConfigError(f"{adapter}: names no base model; name its directory with --base-model")
    opened = OpenedModel(name, trust_remote_code=trust_remote_code)
    if not is_gguf_model(name):
        try:
            _ = opened.config_file
        except FormatError as error:
            where = f"; looked for in {os.getcwd()}, in the directories above the adapter, and on the hub"
            told = "" if os.path.isabs(name) or os.path.exists(name) else where
            raise ConfigError(f"{adapter}: base model: {error}{told}; name its directory with --base-model") from None
    return describe(opened.model, str(name))


def describe(model: nn.Module, path: str | None = None, *, may_grow: bool = False) -> BaseModel:
    """Of a model in memory (meta device is enough), with transformers' experts modules or ours.

    Wrappers of PEFT are looked through: the model below them is described.

    Args:
        may_grow: its vocabulary may still become another one.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    config: PreTrainedConfig = model.config
    specs = {plain_name(name): experts.spec for name, experts in iter_routed_experts(model)} or find_experts(model)
    modules = plain_modules(model)
    linears = {name: (m.out_features, m.in_features) for name, m in modules.items() if _is_linear(m, name, specs)}
    bare = dict(_bare(modules, linears, specs))
    routers = find_routers(modules, {name: spec.num_experts for name, spec in specs.items()})
    values = config.get_text_config().to_dict()
    name = path or getattr(config, "name_or_path", None) or None
    layers = hub_layers(model, specs)
    named = [*model.named_parameters(remove_duplicate=False), *_saved_buffers(model)]
    shapes = {plain_name(name): tuple(tensor.shape) for name, tensor in named if not is_of_adapter(name)}
    shapes |= {f"{name}.weight": shape for name, shape in linears.items()}  # packed ones are no parameters
    matrices = linears | {name.removesuffix(".weight"): shape for name, shape in bare.items()}
    return BaseModel(
        name, config.model_type, values, specs, layers, linears, _hub_names(model, matrices), shapes, bare,
        frozenset(name for name in routers if name in linears), _tied(model), may_grow,
    )  # fmt: skip


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that checkpoints hold, by name."""
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield f"{name}.{key}" if name else key, buffer


def hub_layers(model: Any, specs: dict[str, ExpertsSpec]) -> dict[str, LayerSource]:
    """Where checkpoints of this model keep the experts.

    transformers turns its fused parameters into checkpoint keys; run on meta tensors that gives names and shapes, and
    the mapping used for loading tells which expert each of them is.
    """
    shapes = expert_shapes(model, specs, torch.bfloat16, save_original_format=True)
    return KeyMap(model, specs).layers(shapes, "save_pretrained", lambda key: shapes[key].shape)


def expert_shapes(
    model: Any, specs: dict[str, ExpertsSpec], dtype: torch.dtype, *, save_original_format: bool
) -> dict[str, torch.Tensor]:
    """Meta tensors of the experts under the keys of a checkpoint, or of transformers' own parameters."""
    shapes: dict[str, torch.Tensor] = {}
    for name, spec in specs.items():
        if spec.expert_keys:
            into = torch.empty(spec.inter, spec.hidden, dtype=dtype, device="meta")
            tensors = dict(zip(spec.expert_keys, (into, into, into.mT), strict=True))
            keys = [(expert, child) for expert in range(spec.num_experts) for child in tensors]
            shapes |= {f"{name}.{expert}.{child}.weight": tensors[child] for expert, child in keys}
            continue
        shapes[f"{name}.gate_up_proj"] = torch.empty(spec.gate_up_shape, dtype=dtype, device="meta")
        shapes[f"{name}.down_proj"] = torch.empty(spec.down_shape, dtype=dtype, device="meta")
    if not save_original_format:
        return shapes
    with _known(model, dict(shapes)):
        return revert_weight_conversion(model, shapes)


@contextmanager
def _known(model: nn.Module, parameters: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within it, `get_parameter` gives these: conversions ask for shapes, and experts may lie below PEFT's wrappers."""
    stock = model.get_parameter
    model.get_parameter = lambda name: parameters[name] if name in parameters else stock(name)
    try:
        yield
    finally:
        del model.get_parameter


def _is_linear(module: nn.Module, name: str, specs: dict[str, ExpertsSpec]) -> bool:
    """Whether a module multiplies by a weight and gives the product, so that PEFT adds to its output.

    Routers of some families (Llama 4, Phi-3.5-MoE) are Linear layers with a forward of their own.
    """
    return (
        hasattr(module, "out_features")
        and hasattr(module, "in_features")
        and (not isinstance(module, nn.Linear) or isinstance(module, PackedLinear) or _is_plain(module))
        and not any(name.startswith(f"{experts}.") for experts in specs)
    )


def _is_plain(module: nn.Linear) -> bool:
    return type(module).forward is nn.Linear.forward


def _bare(
    modules: Mapping[str, nn.Module], linears: Mapping[str, tuple[int, int]], specs: Mapping[str, ExpertsSpec]
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Matrices named `weight` of other modules, which PEFT reaches through `target_parameters`."""
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        is_of_experts = any(f"{name}.".startswith(f"{experts}.") for experts in specs)
        if weight is not None and weight.dim() == 2 and name not in linears and not is_of_experts:
            yield f"{name}.weight", tuple(weight.shape)


def _tied(model: Any) -> dict[str, str]:
    """Parameters that the config makes one matrix, target -> source."""
    found = model.get_expanded_tied_weights_keys(all_submodels=True)
    return {plain_name(target): plain_name(source) for target, source in found.items()}


def _hub_names(model: Any, linears: dict[str, tuple[int, int]]) -> dict[str, str]:
    found = {}
    for name, shape in linears.items():
        reverted = list(revert_weight_conversion(model, {f"{name}.weight": torch.empty(shape, device="meta")}))
        if len(reverted) == 1 and reverted[0] != f"{name}.weight":
            found[name] = reverted[0].removesuffix(".weight")
    return found


def default_name(adapter_base: str | None, adapter: Path) -> str | None:
    """The base model that an adapter names, as it is, or else from the nearest directory above the adapter.

    A relative name is one of the directory in which the training ran; the adapter usually lies somewhere below it.
    """
    if adapter_base is None or os.path.isabs(adapter_base) or os.path.exists(adapter_base):
        return adapter_base
    candidates = (folder / adapter_base for folder in adapter.absolute().parents)
    return str(next((path for path in candidates if _is_model(path)), adapter_base))


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or (path.is_file() and is_gguf_model(path))
