"""Adapters of tiny models, and what they add to each weight, computed by plain PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import kt_sft
from kt_sft.adapters import forms
from kt_sft.adapters.model import Adapter, Lora
from kt_sft.integrations.transformers.base_model import find_base_model
from tests.helpers import tiny_models


def make(
    family: str, root: Path, *, rank: int = 3, targets: str | list[str] = "all", seed: int = 5, **overrides
) -> Path:
    """A base model in `root/base` and an adapter of it with random factors in `root/adapter`."""
    base = tiny_models.build(family, root / "base", **overrides)
    config = LoraConfig(r=rank, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
    model = kt_sft.get_peft_model(kt_sft.load_model(base), config)
    randomise(model, seed)
    model.save_pretrained(root / "adapter")
    return root / "adapter"


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Factors large enough to change every logit."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(0.0, 0.2, generator=generator)


def peft_model(root: Path, adapter: Path | None = None) -> PeftModel:
    """Stock transformers and stock PEFT, in eval mode."""
    stock = tiny_models.load_stock(root / "base")
    return PeftModel.from_pretrained(stock, adapter or root / "adapter").eval()


def peft_deltas(root: Path) -> dict[str, Tensor]:
    """What PEFT adds to each parameter, by name, as the model lays it out, float64."""
    found = {}
    for name, module in peft_model(root).double().named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        parameter = getattr(module, "parameter_name", "weight")
        found[f"{path}.{parameter}"] = module.get_delta_weight("default").detach()
    return found


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    """The same of an adapter of any form."""
    found = {f"{name}.weight": _product(adapter.read_linear(name)) for name in adapter.linears}
    for module in adapter.experts:
        spec, loras = adapter.base.specs[module], adapter.read_experts(module)
        products = {projection: _product(lora) for projection, lora in loras.items()}
        if "gate" in products:
            joined = products["gate"].new_zeros(spec.num_experts, 2 * spec.inter, spec.hidden)
            joined[:, spec.gate_rows], joined[:, spec.up_rows] = products["gate"], products["up"]
            found[f"{module}.gate_up_proj"] = joined.mT if spec.is_transposed else joined
        if "down" in products:
            found[f"{module}.down_proj"] = products["down"].mT if spec.is_transposed else products["down"]
    return found


def _product(lora: Lora) -> Tensor:
    return lora.scale * (lora.b.double() @ lora.a.double())


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], *, bound: float = 1e-7) -> None:
    """Equal up to the rounding of f32 factors where a scale went into one of them."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value.abs().max() > 0.01, name
        assert (found[name] - value).abs().max() <= bound * value.abs().max() * 8, name


def zeroed(source: Path, target: Path) -> None:
    """A copy of an adapter whose products are all zero."""
    shutil.copytree(source, target)
    file = target / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)


def opened(path: Path, root: Path) -> Adapter:
    """An adapter of any form, of the base model in `root`."""
    return forms.open_adapter(path, find_base_model(root / "base"))


def convert(root: Path, form: str, output: Path) -> Path:
    """The adapter in `root` in another form."""
    return forms.convert(opened(root / "adapter", root), form, output)


def edit(folder: Path, **changes: object) -> None:
    """Change values of an adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def damaged(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    """What changes the tensors of an adapter directory."""

    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)

    return apply
