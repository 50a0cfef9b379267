"""A saved adapter: what it holds, whether it fits a model, and a copy in PEFT's form of one that has another form."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType
from torch import nn

from kt_sft.adapters.forms import adapter_file, is_fused, is_per_expert, open_adapter, write_directory
from kt_sft.adapters.model import BaseModel
from kt_sft.adapters.tensor_file import TensorFile
from kt_sft.errors import FormatError
from kt_sft.integrations.base_model import describe
from kt_sft.integrations.peft.binding import PEFT_SWAPS_FACTORS
from kt_sft.integrations.peft.targets import SIDE_FILE, ExpertLoraConfig, effective_rank, expert_targets
from kt_sft.models.spec import iter_routed_experts

PREFIX = "base_model.model."
RUNNING_FORM = "peft-0.18" if PEFT_SWAPS_FACTORS else "peft-0.19"


def local_adapter_dir(adapter: str | Path, *, subfolder: str | None = None, **hub) -> Path:
    """The adapter's directory, or its GGUF file, on this machine; a hub name is downloaded (config and weights only).

    Raises:
        FormatError: no such directory, or one without `adapter_config.json`.
    """
    root = Path(adapter)
    if root.is_file():
        return adapter_file(root)
    is_hub_name = (
        not root.exists() and len(root.parts) == 2 and not root.is_absolute() and root.parts[0] not in (".", "..")
    )
    if is_hub_name:
        from huggingface_hub import snapshot_download

        try:
            patterns = ["*adapter_*", f"*{SIDE_FILE}"]
            root = Path(snapshot_download(str(adapter), allow_patterns=patterns, **hub))
        except Exception as exc:
            missing = f"no such adapter directory, and not available from the hub ({type(exc).__name__})"
            raise FormatError(adapter, missing, remedy="check the path") from exc
    folder = root / subfolder if subfolder else root
    if not folder.is_dir():
        raise FormatError(folder, "no such adapter directory", remedy="check the path")
    folder = adapter_file(folder)
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        raise FormatError(folder, f"no {CONFIG_NAME} in it", remedy="name the directory that save_pretrained wrote")
    return folder


def check_adapter(model: nn.Module, source: Path) -> None:
    """Whether an adapter of any form fits a model without one; reads headers only.

    Raises:
        FormatError, UnsupportedModel: it does not, or is damaged.
    """
    if has_other_form(model, source):
        open_adapter(source, describe(model))
    else:
        check_adapter_fits(model, read_adapter_config(source), source)


@contextmanager
def in_running_form(model: nn.Module, source: Path) -> Iterator[Path]:
    """The adapter's directory for the PEFT that runs: its own, or a converted copy that is gone afterwards.

    Raises:
        FormatError, UnsupportedModel: an adapter of another form that does not fit, or is damaged.
    """
    if not has_other_form(model, source):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="kt_sft-adapter-") as folder:
        write_directory(open_adapter(source, describe(model)), RUNNING_FORM, Path(folder))
        yield Path(folder)


def has_other_form(model: nn.Module, source: Path) -> bool:
    """Whether an adapter has to be converted before the running PEFT reads it: a GGUF file, pairs per expert, or
    fused experts in the layout of another release.
    """
    if source.is_file():
        return True
    config = read_adapter_config(source)
    names = TensorFile(source)
    if is_per_expert(names) or (is_fused(names) and not config.target_parameters):
        return True
    if _names_others(describe(model), config, names):
        return True
    experts = dict(iter_routed_experts(model))
    expected = _expected_expert_tensors(config, experts)
    shapes = {f"{PREFIX}{name}": names.shape(name) for name in names}
    found = [(shapes.get(key), ours, other) for key, (ours, other) in expected.items()]
    return any(shape != ours for shape, ours, _ in found) and all(shape == other for shape, _, other in found)


def _names_others(base: BaseModel, config: ExpertLoraConfig, names: TensorFile) -> bool:
    """Whether pairs are stored under names that PEFT cannot wrap: those of checkpoints, or of routers that are no
    Linear layers any more, as adapters of transformers 4 have them.
    """
    stems = {name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight")}
    parameters = [f"{stem}.weight" for stem in stems if f"{stem}.weight" in base.bare]
    entries = config.target_parameters or []
    unnamed = [p for p in parameters if not any(p == entry or p.endswith(f".{entry}") for entry in entries)]
    return bool(unnamed) or bool(stems & set(base.hub_names.values()))


def read_adapter_config(folder: Path) -> ExpertLoraConfig:
    """PEFT's config with the dropout from beside it, ready to build wrappers."""
    path = folder / CONFIG_NAME
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as exc:
        raise FormatError(path, f"not a PEFT config ({str(exc).splitlines()[0]})") from exc
    if config.peft_type != PeftType.LORA:
        raise FormatError(
            path, "peft_type", expected="LORA", found=getattr(config.peft_type, "value", config.peft_type)
        )
    config = ExpertLoraConfig.of(config)
    beside = _read_side_file(folder)
    config.model_type = beside.get("model_type")
    if config.target_parameters:
        config.move_dropout(beside.get("lora_dropout"))
    return config


def check_adapter_fits(model: nn.Module, config: ExpertLoraConfig, folder: Path) -> None:
    """Compare the adapter's tensors with the model's modules, by names and shapes, before anything changes.

    Raises:
        FormatError: one line with the first fault and the number of further ones.
    """
    path, shapes = _tensor_shapes(folder)
    _check_model_type(model, config, path)
    faults = list(_faults(model, config, shapes))
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        what, expected, found = faults[0]
        remedy = f"load it on the model it was trained on{_base_hint(config)}"
        raise FormatError(path, what, expected=expected, found=f"{found}{more}", remedy=remedy)


def _read_side_file(folder: Path) -> dict:
    path = folder / SIDE_FILE
    if not path.is_file():
        return {}
    try:
        beside = json.loads(path.read_text())
        if not isinstance(beside, dict) or not 0.0 <= float(beside.get("lora_dropout", 0.0)) < 1.0:
            raise ValueError("expected an object with 0 <= lora_dropout < 1")
    except (ValueError, TypeError) as exc:
        raise FormatError(path, str(exc), remedy="restore the file or delete it (dropout is then 0)") from exc
    return beside


def _tensor_shapes(folder: Path) -> tuple[Path, dict[str, tuple[int, ...]]]:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if path.is_file():
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as tensors:
                keys = tensors.keys()
                return path, {key: tuple(tensors.get_slice(key).get_shape()) for key in keys}
        except (SafetensorError, OSError) as exc:
            raise FormatError(path, f"damaged ({exc})", remedy="save or copy the adapter again") from exc
    path = folder / WEIGHTS_NAME
    if path.is_file():
        tensors = torch.load(path, map_location="meta", weights_only=True)
        return path, {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    raise FormatError(folder, "no adapter weights", expected=SAFETENSORS_WEIGHTS_NAME, found="none")


def _check_model_type(model: nn.Module, config: ExpertLoraConfig, path: Path) -> None:
    here = getattr(getattr(model, "config", None), "model_type", None)
    there = config.model_type or _base_model_type(config)
    if here and there and here != there:
        raise FormatError(
            path, "trained on another model type", expected=here, found=there, remedy="use an adapter of this model"
        )


def _base_model_type(config: ExpertLoraConfig) -> str | None:
    """The base model's type if its directory is still where the adapter says."""
    path = Path(config.base_model_name_or_path or "", "config.json")
    try:
        return json.loads(path.read_text()).get("model_type") if config.base_model_name_or_path else None
    except (OSError, ValueError, AttributeError):
        return None


def _base_hint(config: ExpertLoraConfig) -> str:
    return f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""


def _faults(model: nn.Module, config: ExpertLoraConfig, shapes: dict[str, tuple[int, ...]]):
    """(what, expected, found) for each tensor that does not fit."""
    experts = dict(iter_routed_experts(model))
    expected = _expected_expert_tensors(config, experts)
    for key, (shape, other_shape) in expected.items():
        found = shapes.get(key)
        if found is None:
            yield f"{key} is missing", list(shape), "none"
        elif found != shape:
            by_other = " (written by a PEFT release with the roles of lora_A and lora_B exchanged)"
            yield f"{key} has another shape", list(shape), f"{list(found)}{by_other if found == other_shape else ''}"
    modules = dict(model.named_modules())
    for name, module in modules.items():
        key = f"{PREFIX}{name}.lora_A.weight"
        is_target = config.target_modules and check_target_module_exists(config, name)
        if is_target and isinstance(module, nn.Linear) and key not in shapes:
            yield f"{key} is missing", [effective_rank(config, name), module.in_features], "none"
    for key, found in shapes.items():
        if key in expected:
            continue
        module_name, _, role = key.removeprefix(PREFIX).partition(".lora_")
        module = modules.get(module_name)
        if not role:
            continue  # modules_to_save and embeddings: PEFT reports those itself
        if module is None or module_name in experts:
            yield f"{key} belongs to no LoRA target of this model", "a module of the model", "none"
        elif isinstance(module, nn.Linear) and role in ("A.weight", "B.weight"):
            rank = effective_rank(config, module_name)
            shape = (rank, module.in_features) if role == "A.weight" else (module.out_features, rank)
            if found != shape:
                yield f"{key} has another shape", list(shape), list(found)


def _expected_expert_tensors(config: ExpertLoraConfig, experts: dict[str, nn.Module]) -> dict[str, tuple]:
    """Key -> (shape in the running PEFT's layout, shape in the other one), nested as PEFT nests its wrappers."""
    targets = expert_targets(config, experts)
    expected = {}
    for name, module in experts.items():
        mine = [target for target in targets if target.rpartition(".")[0] == name]
        for depth, target in enumerate(reversed(mine)):  # the last one wrapped is the outermost
            num_experts, out_width, in_width = getattr(module, target.rpartition(".")[2]).shape
            stacked = num_experts * effective_rank(config, target)
            swapped = ((stacked, out_width), (in_width, stacked))
            straight = ((stacked, in_width), (out_width, stacked))
            ours, other = (swapped, straight) if PEFT_SWAPS_FACTORS else (straight, swapped)
            stem = f"{PREFIX}{name}{'.base_layer' * depth}.lora_"
            expected[f"{stem}A.weight"] = (ours[0], other[0])
            expected[f"{stem}B.weight"] = (ours[1], other[1])
    return expected
