"""A saved adapter for PEFT: whether it fits a model, PEFT's config of it, and a copy in the form of the PEFT that runs.

What lies in its directory is read by `kt_sft.adapters` alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from kt_sft.adapters import options, peft_config
from kt_sft.adapters.forms import open_adapter, write_directory
from kt_sft.adapters.model import Adapter
from kt_sft.compat.peft import RELEASE
from kt_sft.errors import FormatError, as_ours, first_line
from kt_sft.formats.file_names import ADAPTER_CONFIG
from kt_sft.integrations.peft.targets import RUNNING_FORM, ExpertLoraConfig
from kt_sft.integrations.transformers.base_model import describe

# Ways to begin that leave the base model as it is: the factors are in the file, and PEFT need not make others first.
_PLAIN_BEGINNINGS = ("eva", "orthogonal", "mica")


def check_adapter(model: nn.Module, source: Path, *, may_grow: bool = False) -> Adapter:
    """Whether an adapter of any form fits a model, and whether it is made of numbers.

    Args:
        model: one that carries PEFT's wrappers already is taken for the model below them.
        may_grow: its vocabulary may still become another one.
    Raises:
        FormatError, UnsupportedModel: it does not, or is damaged.
    """
    base = describe(model, may_grow=may_grow)
    adapter = open_adapter(source, base, door=options.LOAD)
    named = adapter.config.get("target_modules") or adapter.config.get("target_parameters")
    has_default = base.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if RUNNING_FORM in adapter.as_is and not named and not has_default:
        expected = "names of modules, as PEFT has no default for this family"
        raise FormatError(source / ADAPTER_CONFIG, "target_modules", expected=expected, found="none")
    return adapter


@contextmanager
def in_running_form(model: nn.Module, source: Path, *, may_grow: bool = False) -> Iterator[Path]:
    """The adapter's directory for the PEFT that runs: its own, or a converted copy that is gone afterwards.

    Args:
        model, may_grow: see `check_adapter`.
    Raises:
        FormatError, UnsupportedModel: an adapter that does not fit, with NaN or infinity, or damaged.
    """
    adapter = check_adapter(model, source, may_grow=may_grow)
    if RUNNING_FORM in adapter.as_is:
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="kt_sft-adapter-") as folder:
        # Once more, as one that becomes another: what belongs to other weights than the model's could not.
        adapter = open_adapter(source, describe(model), reads_headers_only=True)
        write_directory(adapter, RUNNING_FORM, Path(folder))
        yield Path(folder)


def read_adapter_config(folder: Path) -> ExpertLoraConfig:
    """PEFT's config with the dropout from beside it, ready to build wrappers.

    Raises:
        FormatError: missing, damaged, not LoRA, or with values that it cannot have.
    """
    config = ExpertLoraConfig.of(saved_config(folder))
    config.peft_version = RELEASE  # which writes it from now on, in its own layout
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
    values = peft_config.read_config(folder, options.LOAD)
    begun = values.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower() in _PLAIN_BEGINNINGS:
        values["init_lora_weights"] = True

    def ours(error: BaseException) -> FormatError:  # of options that exclude one another
        return FormatError(folder / ADAPTER_CONFIG, f"not a PEFT config ({first_line(error)})")

    with as_ours(ours, (ValueError, TypeError, ImportError)):
        return LoraConfig(**values)
