"""Forward passes that tell whether an adapter matters: each module with it and without it, and nothing else changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kt_sft.models.spec import iter_routed_experts

_AMPLIFIED = 2.0**20  # of an adapter after one step whose output is lost in the rounding of the base layer's


class Comparison:
    """Forward hooks that compute each layer once more with its adapter off."""

    def __init__(self, updated: dict[str, Tensor], names: dict[int, str]):
        self.updated, self.names = updated, names
        self.inert: list[str] = []
        self._is_inside = False

    @contextmanager
    def of_each(self, model: nn.Module) -> Iterator[None]:
        """Within it, forward passes of the model compare."""
        inner = {id(m.base_layer) for m in model.modules() if isinstance(m, ParamWrapper)}
        outermost = [m for m in model.modules() if isinstance(m, LoraLayer) and id(m) not in inner]
        handles = [layer.register_forward_hook(self._compare, with_kwargs=True) for layer in outermost]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _compare(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        name = self._trained(layer, args, kwargs)
        if self._is_inside or name is None:
            return
        self._is_inside = True
        try:
            chain = list(_chain(layer))
            with switched_off(chain):
                off = layer(*args, **kwargs)
            if _is_same(output, off):
                with amplified(chain):
                    output = layer(*args, **kwargs)
                if _is_same(output, off):
                    self.inert.append(name)
        finally:
            self._is_inside = False

    def _trained(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str | None:
        """Its name, if this call uses what the step has changed."""
        base = layer.get_base_layer()
        name = self.names.get(id(layer), self.names.get(id(base)))
        if name is None or not self.updated[name].any():
            return None
        if len(self.updated[name]) == 1:
            return name
        ids = expert_ids(args, kwargs)
        return name if ids is None or self.updated[name][ids[ids < len(self.updated[name])].cpu()].any() else None


def expert_ids(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """`top_k_index` of a call of the experts, `[tokens, k]`."""
    ids = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
    return ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None


def _chain(layer: nn.Module) -> Iterator[nn.Module]:
    """A layer and, of the experts, the wrapper within."""
    while isinstance(layer, LoraLayer):
        yield layer
        layer = layer.base_layer if isinstance(layer, ParamWrapper) else None


def _is_same(first: Any, second: Any) -> bool:
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return all(torch.equal(one, other) for one, other in pairs if isinstance(one, Tensor))


@contextmanager
def switched_off(layers: list[nn.Module]) -> Iterator[None]:
    """PEFT's own switch would also set requires_grad, which the run may have set otherwise."""
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, is_disabled in zip(layers, before, strict=True):
            layer._disable_adapters = is_disabled


@contextmanager
def amplified(layers: list[nn.Module]) -> Iterator[None]:
    scalings = [(layer.scaling, dict(layer.scaling)) for layer in layers if isinstance(layer, LoraLayer)]
    for scaling, before in scalings:
        scaling.update({name: value * _AMPLIFIED for name, value in before.items()})
    try:
        yield
    finally:
        for scaling, before in scalings:
            scaling.update(before)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Forward passes in eval mode that leave modes, random numbers and the copies of the experts' factors as before."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for _, experts in iter_routed_experts(model):
                if experts.lora is not None:
                    experts.lora.drop_copies()
