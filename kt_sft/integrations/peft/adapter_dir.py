"""A saved adapter: what it holds, whether it fits a model, and a copy in PEFT's form of one that has another form."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import peft
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from kt_sft.adapters import layout, peft_config
from kt_sft.adapters.folder import CONFIG_NAME, EXPERTS_NAME, check_names, left_out
from kt_sft.adapters.forms import adapter_file, is_fused, is_per_expert, open_adapter, write_directory
from kt_sft.adapters.model import BaseModel
from kt_sft.adapters.patterns import check_speed
from kt_sft.adapters.plain import LinearReader
from kt_sft.adapters.tensor_file import PREFIX, TensorFile
from kt_sft.errors import FormatError
from kt_sft.formats.json_object import read_object
from kt_sft.integrations.peft.targets import (
    RUNNING_FORM,
    SIDE_FILE,
    ExpertLoraConfig,
    effective_rank,
    expert_targets,
)
from kt_sft.integrations.peft.unwrapped import plain_modules, plain_name
from kt_sft.integrations.transformers.base_model import describe
from kt_sft.models.layout import ExpertsSpec
from kt_sft.models.spec import iter_routed_experts

logger = logging.getLogger(__name__)

# Ways to begin that leave the base model as it is: the factors are in the file, and PEFT need not make others first.
_PLAIN_BEGINNINGS = ("eva", "orthogonal", "mica")
_TAKEN = {"F32", "BF16", "F16"}  # element types that PEFT keeps right whichever way it loads them


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
        root = _downloaded(str(adapter), subfolder, hub)
    folder = root / subfolder if subfolder else root
    if not folder.is_dir():
        raise FormatError(folder, "no such adapter directory", remedy="check the path")
    folder = adapter_file(folder)
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        raise FormatError(folder, f"no {CONFIG_NAME} in it", remedy="name the directory that save_pretrained wrote")
    return folder


def _downloaded(adapter: str, subfolder: str | None, hub: dict) -> Path:
    """A snapshot with what is read of an adapter, and with the names of other files that have tensors."""
    from huggingface_hub import HfApi, snapshot_download

    patterns = ["*adapter_*", f"*{SIDE_FILE}", f"*{EXPERTS_NAME}"]
    try:
        root = Path(snapshot_download(adapter, allow_patterns=patterns, **hub))
    except Exception as exc:
        missing = f"no such adapter directory, and not available from the hub ({type(exc).__name__})"
        raise FormatError(adapter, missing, remedy="check the path") from exc
    if hub.get("local_files_only"):
        return root
    try:
        names = HfApi(token=hub.get("token")).list_repo_files(adapter, revision=hub.get("revision"))
    except Exception as exc:  # offline: what was downloaded earlier has to do
        logger.info("%s: the names of its files could not be asked for (%s)", adapter, type(exc).__name__)
        return root
    here = [name for name in names if Path(name).parent == Path(subfolder or ".")]
    check_names(root, [Path(name).name for name in here])
    return root


def check_adapter(model: nn.Module, source: Path, *, may_grow: bool = False) -> None:
    """Whether an adapter of any form fits a model, and whether it is made of numbers.

    Args:
        model: one that carries PEFT's wrappers already is taken for the model below them.
        may_grow: its vocabulary may still become another one.
    Raises:
        FormatError, UnsupportedModel: it does not, or is damaged.
    """
    if has_other_form(model, source):
        open_adapter(source, describe(model))
    else:
        check_adapter_fits(model, read_adapter_config(source), source, may_grow=may_grow)
        TensorFile(source).check_finite()


@contextmanager
def in_running_form(model: nn.Module, source: Path) -> Iterator[Path]:
    """The adapter's directory for the PEFT that runs: its own, or a converted copy that is gone afterwards.

    Every number is looked at.

    Args:
        model: with or without PEFT's wrappers.
    Raises:
        FormatError, UnsupportedModel: an adapter with NaN or infinity, or one of another form that does not fit, or is
            damaged.
    """
    if not has_other_form(model, source):
        TensorFile(source).check_finite()
        for sentence in left_out(source):
            logger.warning("%s: %s", source, sentence)
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="kt_sft-adapter-") as folder:
        write_directory(open_adapter(source, describe(model)), RUNNING_FORM, Path(folder))
        yield Path(folder)


def has_other_form(model: nn.Module, source: Path) -> bool:
    """Whether an adapter has to be converted before the running PEFT reads it: a GGUF file, one of KTransformers, pairs
    per expert, or fused experts in the layout of another release.

    Raises:
        FormatError: damaged, or fused experts in a layout that cannot be told.
    """
    if source.is_file():
        return True
    config = read_adapter_config(source)
    names = TensorFile(source)
    if TensorFile.of_experts(source) is not None or is_per_expert(names):
        return True
    if names.dtypes() - _TAKEN or _names_others(describe(model), config, names):
        return True
    if is_fused(names) and not config.target_parameters:
        return True
    specs = {plain_name(name): experts.spec for name, experts in iter_routed_experts(model)}
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    widths = _widths(config, specs, names)
    given = {"peft_version": _stated_version(source)}
    beside = peft_config.read_side_file(source)
    found = layout.decide(widths, specs, model_type, given, beside, names.path)
    return any(
        is_exchanged != layout.exchanges(RUNNING_FORM, specs[name.rpartition(".")[0]], model_type)
        for name, is_exchanged in found.exchanged.items()
    )


def _stated_version(folder: Path) -> object:
    """As the file has it: PEFT's own config would put the running version in the place of none."""
    return read_object(folder / CONFIG_NAME).get("peft_version")


def _widths(config: ExpertLoraConfig, specs: Mapping[str, ExpertsSpec], names: TensorFile) -> layout.Widths:
    """Columns of lora_A and rows of lora_B of each parameter of the experts, where both are there."""
    found = {}
    for target, stem in _stems(config, specs).items():
        keys = [f"{stem}{role}.weight" for role in "AB"]
        shapes = [names.shape(key) if key in names else () for key in keys]
        if all(len(shape) == 2 for shape in shapes):
            found[target] = (shapes[0][1], shapes[1][0])
    return found


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
    """PEFT's config with the dropout from beside it, ready to build wrappers.

    Raises:
        FormatError: missing, damaged, not LoRA, or with values that it cannot have.
    """
    config = ExpertLoraConfig.of(saved_config(folder))
    config.peft_version = peft.__version__  # which writes it from now on, in its own layout
    beside = peft_config.read_side_file(folder)
    config.model_type = beside.get("model_type")
    if config.target_parameters:
        config.move_dropout(beside.get("lora_dropout"))
    return config


def saved_config(folder: Path) -> LoraConfig:
    """PEFT's config as it is in adapter_config.json, without the keys that mean nothing here.

    Raises:
        FormatError: missing, damaged, not LoRA, or with values that it cannot have.
    """
    values = peft_config.read_values(folder)
    begun = values.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower() in _PLAIN_BEGINNINGS:
        values["init_lora_weights"] = True
    if isinstance(begun, str) and begun.lower() in ("corda", "loftq", "lora_ga"):
        raise FormatError(
            folder / CONFIG_NAME, "init_lora_weights", expected="LoRA that begins without further files",
            found=repr(begun), remedy="save it with PEFT's path_initial_model_for_weight_conversion",
        )  # fmt: skip
    try:
        return LoraConfig(**values)
    except (ValueError, TypeError, ImportError) as exc:  # options that exclude one another
        raise FormatError(folder / CONFIG_NAME, f"not a PEFT config ({str(exc).splitlines()[0]})") from exc


def check_adapter_fits(model: nn.Module, config: ExpertLoraConfig, folder: Path, *, may_grow: bool = False) -> None:
    """Compare the adapter's tensors with the model's modules, by names and shapes, before anything changes.

    PEFT passes over names that it does not know, and computes without what the config names and the file lacks.

    Args:
        may_grow: leave alone what has the size of the vocabulary, and all else beside plain LoRA.
    Raises:
        FormatError: one line with the first fault and the number of further ones.
    """
    base = describe(model)
    has_default = base.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if config.target_modules is None and not config.target_parameters and not has_default:
        expected = "names of modules, as PEFT has no default for this family"
        raise FormatError(folder / CONFIG_NAME, "target_modules", expected=expected, found="none")
    check_patterns(model, config, folder, base)
    names = TensorFile(folder)
    path, shapes = names.path, {f"{PREFIX}{name}": names.shape(name) for name in names}
    _check_model_type(model, config, path)
    faults = list(_faults(model, config, shapes))
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        what, expected, found = faults[0]
        remedy = f"load it on the model it was trained on{_base_hint(config)}"
        raise FormatError(path, what, expected=expected, found=f"{found}{more}", remedy=remedy)
    if not may_grow:
        known = {key.removeprefix(PREFIX) for key in _expected_expert_tensors(config, base.specs, model)}
        LinearReader(names, config.to_dict(), base, known).whole()
    for key in _saved_tensors(model, config):
        if key not in names:
            raise FormatError(path, f"tensor {key}", expected="present", found="missing")


def check_patterns(model: nn.Module, config: ExpertLoraConfig, folder: Path, base: BaseModel | None = None) -> None:
    """Whether the regular expressions of a config come to an end with this model's names; before anything uses them.

    Raises:
        FormatError: names the one that does not.
    """
    names = [*plain_modules(model), *(base or describe(model)).target_names()]
    check_speed(vars(config), names, folder / CONFIG_NAME)


def _check_model_type(model: nn.Module, config: ExpertLoraConfig, path: Path) -> None:
    here = getattr(getattr(model, "config", None), "model_type", None)
    there = config.model_type or _base_model_type(config)
    if here and there and here != there:
        raise FormatError(
            path, "trained on another model type", expected=here, found=there, remedy="use an adapter of this model"
        )


def _base_model_type(config: ExpertLoraConfig) -> str | None:
    """The base model's type if its directory is still where the adapter says."""
    if not config.base_model_name_or_path:
        return None
    try:
        found = read_object(Path(config.base_model_name_or_path, "config.json")).get("model_type")
    except FormatError:
        return None
    return found if isinstance(found, str) else None


def _base_hint(config: ExpertLoraConfig) -> str:
    return f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""


def _faults(model: nn.Module, config: ExpertLoraConfig, shapes: dict[str, tuple[int, ...]]):
    """(what, expected, found) for each tensor that does not fit."""
    experts = {plain_name(name): module for name, module in iter_routed_experts(model)}
    expected = _expected_expert_tensors(config, {name: module.spec for name, module in experts.items()}, model)
    for key, shape in expected.items():
        found = shapes.get(key)
        if found is None:
            yield f"{key} is missing", list(shape), "none"
        elif found != shape:
            yield f"{key} has another shape", list(shape), list(found)
    modules = plain_modules(model)
    for name, module in modules.items():
        if not config.target_modules or not isinstance(module, nn.Linear):
            continue
        keys = [f"{PREFIX}{name}.lora_{role}.weight" for role in "AB"]
        missing = [key for key in keys if key not in shapes]
        if missing and check_target_module_exists(config, name):
            rank = effective_rank(config, name)
            shape = [rank, module.in_features] if missing[0] == keys[0] else [module.out_features, rank]
            yield f"{missing[0]} is missing", shape, "none"
    for key, found in shapes.items():
        if key in expected:
            continue
        module_name, _, role = key.removeprefix(PREFIX).partition(".lora_")
        module = modules.get(module_name)
        if not role:
            continue  # modules_to_save and base layers
        if module is None or module_name in experts:
            yield f"{key} belongs to no LoRA target of this model", "a module of the model", "none"
        elif isinstance(module, nn.Linear) and role in ("A.weight", "B.weight"):
            rank = effective_rank(config, module_name)
            shape = (rank, module.in_features) if role == "A.weight" else (module.out_features, rank)
            if found != shape:
                yield f"{key} has another shape", list(shape), list(found)


def _saved_tensors(model: nn.Module, config: ExpertLoraConfig) -> Iterator[str]:
    """Names of all that PEFT asks an adapter for with `modules_to_save`, buffers included."""
    for name, module in plain_modules(model).items():
        if any(name.endswith(entry) for entry in config.modules_to_save or ()):
            yield from (f"{name}.{key}" for key in module.state_dict())


def _stems(config: ExpertLoraConfig, experts: Iterable[str]) -> dict[str, str]:
    """Name of the factors without `A.weight`, by parameter of the experts, nested as PEFT nests its wrappers."""
    experts = list(experts)
    targets = expert_targets(config, experts)
    found = {}
    for name in experts:
        mine = [target for target in targets if target.rpartition(".")[0] == name]
        for depth, target in enumerate(reversed(mine)):  # the last one wrapped is the outermost
            found[target] = f"{name}{'.base_layer' * depth}.lora_"
    return found


def _expected_expert_tensors(
    config: ExpertLoraConfig, specs: Mapping[str, ExpertsSpec], model: nn.Module
) -> dict[str, tuple[int, int]]:
    """Shapes in the running PEFT's layout, by key."""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    expected = {}
    for target, stem in _stems(config, specs).items():
        spec = specs[target.rpartition(".")[0]]
        stacked = spec.num_experts * effective_rank(config, target)
        out, into = layout.matrix_shape(spec, target)
        columns, rows = (out, into) if layout.exchanges(RUNNING_FORM, spec, model_type) else (into, out)
        expected[f"{PREFIX}{stem}A.weight"] = (stacked, columns)
        expected[f"{PREFIX}{stem}B.weight"] = (rows, stacked)
    return expected
