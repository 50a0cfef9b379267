"""Which files of an adapter directory hold its tensors, and which are known to be something else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kt_sft.errors import FormatError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
EXPERTS_NAME = "fused_expert_lora.safetensors"  # KTransformers' LoRA of routed experts
_REWARD_HEADS = ("value_head.safetensors", "value_head.bin")
_TENSOR_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".npy", ".h5", ".pkl", ".msgpack",
)  # fmt: skip
# What transformers' Trainer, accelerate and KTransformers keep in a checkpoint to continue its training.
_STATE = re.compile(
    r"training_args\.bin|pytorch_model_fsdp\w*\.bin"
    r"|(optimizer|scheduler|scaler|rng_state|random_states|custom_checkpoint|sampler|dl_state_dict)\w*\.(pt|pth|bin|pkl|safetensors)"
)


def weights_file(folder: Path) -> Path | None:
    """PEFT's file of an adapter, after a look at all others; None where KTransformers' LoRA of the experts is all.

    Raises:
        FormatError: no adapter's tensors, or files with tensors that are not read.
    """
    check_files(folder)
    for name in (WEIGHTS_NAME, PICKLE_NAME):
        if (folder / name).is_file():
            return folder / name
    if (folder / EXPERTS_NAME).is_file():
        return None
    raise FormatError(folder, "no adapter weights", expected=WEIGHTS_NAME, found="none")


def check_files(folder: Path, read: tuple[str, ...] = ()) -> None:
    """Every file with tensors is read, or known to be no part of an adapter.

    Args:
        read: names that are read; empty: those of PEFT and KTransformers.
    Raises:
        FormatError: names the files that are not.
    """
    check_names(folder, sorted(path.name for path in folder.iterdir() if path.is_file()), read)


def check_names(folder: Path, found: Sequence[str], read: tuple[str, ...] = ()) -> None:
    """The same of the names of files, wherever they are."""
    main = PICKLE_NAME if WEIGHTS_NAME not in found else WEIGHTS_NAME
    known = (*(read or (main, EXPERTS_NAME)), *_REWARD_HEADS)
    unread = [name for name in found if is_tensor_file(name) and name not in known]
    if unread:
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        raise FormatError(
            folder,
            "tensors beside the adapter",
            expected=f"{' and '.join(read or (main, EXPERTS_NAME))} at most",
            found=f"{', '.join(unread[:3])}{more}, which nothing here reads",
            remedy="move it out of the directory if the adapter is whole without it",
        )


def is_tensor_file(name: str) -> bool:
    """Whether a file of this name holds tensors that could belong to an adapter."""
    is_hidden = name.startswith(".")
    return name.lower().endswith(_TENSOR_SUFFIXES) and not is_hidden and _STATE.fullmatch(name) is None


def left_out(folder: Path) -> list[str]:
    """Sentences on files that belong to an adapter and are not part of what is read."""
    heads = [name for name in _REWARD_HEADS if (folder / name).is_file()]
    return [f"{name} is not read: the head of a reward model, which only LLaMA-Factory loads" for name in heads]
