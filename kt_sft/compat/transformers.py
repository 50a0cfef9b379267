"""Names of transformers that it does not document, each with what it is and since which release.

Of 5.6, which this release supports; what another one calls differently gets its answer here. Where no release is said,
4.57 had it already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Since 5.0: from a model's class to the renamings and converters of its checkpoints, and a place for further families.
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

# Since 5.0: what these are made of, how a key is looked up in them, and the way back from parameters to keys.
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.integrations.moe import _default_apply_gate

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

__all__ = [
    "ConversionOps",
    "WeightConverter",
    "WeightRenaming",
    "get_checkpoint_conversion_mapping",
    "get_model_conversion_mapping",
    "register_checkpoint_conversion_mapping",
    "rename_source_key",
    "revert_weight_conversion",
]

# Methods of Trainer: writing a checkpoint, writing the model, reading the optimizer; then where checkpoints of a run
# lie, and the upload of one.
SAVE_CHECKPOINT, SAVE, LOAD_OPTIMIZER = "_save_checkpoint", "_save", "_load_optimizer_and_scheduler"
OUTPUT_FOLDER, PUSH = "_get_output_dir", "_push_from_checkpoint"


# Experts modules


def has_gate_function(experts: nn.Module) -> bool:
    """Whether a module has the experts interface's own method between the two products; decorated since 5.0."""
    return hasattr(experts, "_apply_gate")


def has_plain_gate(experts: nn.Module) -> bool:
    """Whether that method is the interface's default, act(gate) * up."""
    return type(experts)._apply_gate is _default_apply_gate


# Loading and saving models


def mark_initialized(parameter: Tensor) -> None:
    """Keep the loader from giving a parameter that no file holds first values."""
    parameter._is_hf_initialized = True


def leave_unread(model: PreTrainedModel, patterns: Iterable[str]) -> None:
    """Have the loader pass over further keys of the checkpoint in silence, for one model."""
    model._keys_to_ignore_on_load_unexpected = [*(model._keys_to_ignore_on_load_unexpected or []), *patterns]


def read_all_again(model: PreTrainedModel) -> None:
    """Undo `leave_unread`."""
    with suppress(AttributeError):
        del model._keys_to_ignore_on_load_unexpected


def drop_conversions(model: nn.Module, drops: Callable[[Any], bool]) -> None:
    """Take conversions off a loaded model, which keeps them for saving since 5.0."""
    if hasattr(model, "_weight_conversions"):
        model._weight_conversions = [entry for entry in model._weight_conversions or [] if not drops(entry)]


def renamed_on_loading(model: nn.Module) -> dict[str, str] | None:
    """Patterns by which a class renames keys of checkpoints; transformers' own had them up to 5.2."""
    return getattr(model, "_checkpoint_conversion_mapping", None)


def forget_quantizer(name: str) -> None:
    """Take a registered quantizer out of the tables, since registering a name twice is refused."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    AUTO_QUANTIZER_MAPPING.pop(name, None)
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(name, None)


def serves(auto_class: Any, config_class: type) -> bool:
    """Whether an auto class has a model for a class of configs."""
    return config_class in auto_class._model_mapping


def use_attention(config: PreTrainedConfig, implementation: str) -> None:
    """Choose the attention of a model that is about to be built of a config."""
    config._attn_implementation = implementation


# Generating


def keeps_state(model: nn.Module) -> bool:
    """Whether a model carries a state beside keys and values, so that a prompt has to be read in one go."""
    return getattr(model, "_is_stateful", False)


# Training


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Keep the trainer from copying the model to every GPU it sees."""
    arguments._n_gpu = 1


def run_folder(trainer: Trainer, trial: Any) -> Path:
    """Where the checkpoints of a run, or of one of its trials, lie."""
    return Path(getattr(trainer, OUTPUT_FOLDER)(trial=trial))


def push_checkpoint(trainer: Trainer, folder: Path) -> None:
    """Upload a checkpoint, if the run asks for that."""
    getattr(trainer, PUSH)(str(folder))


@contextmanager
def diverted(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Within it the trainer saves into another folder, and so finds no older ones to delete; it uploads nothing."""
    setattr(trainer, OUTPUT_FOLDER, lambda trial: str(folder))
    setattr(trainer, PUSH, lambda checkpoint: None)
    try:
        yield
    finally:
        delattr(trainer, OUTPUT_FOLDER)
        delattr(trainer, PUSH)


def delete_older_checkpoints(folder: Path, *, most: int | None, best: str | None) -> None:
    """All but the newest `most` checkpoints of a run, and the best one; a function since 5.2."""
    from transformers.trainer_utils import rotate_checkpoints

    rotate_checkpoints(
        output_dir=str(folder), save_total_limit=most, best_model_checkpoint=best, use_mtime=True
    )  # fmt: skip


def reporters() -> tuple[Sequence[str], Sequence[str]]:
    """Services that `report_to` may name: those that are installed, and all that are known."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    return get_available_reporting_integrations(), list(INTEGRATION_TO_CALLBACK)
