"""Where an adapter lies, which files of its directory hold its tensors, and which are known to be something else."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kt_sft.errors import FormatError
from kt_sft.formats.file_names import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS
from kt_sft.formats.gguf import SUFFIX

logger = logging.getLogger(__name__)

SIDE_FILE = "kt_sft.json"  # what PEFT does not know of an adapter
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


def adapter_file(path: str | os.PathLike[str]) -> Path:
    """The GGUF file or the directory that a path names: a directory that holds one GGUF file and no config means it.

    Raises:
        FormatError: nothing there, neither of both, or a GGUF file beside others with tensors.
    """
    path = Path(path)
    if path.is_file() and path.suffix == SUFFIX:
        return path
    if not path.is_dir():
        found = "another kind of file" if path.exists() else "nothing"
        expected = f"a directory with {ADAPTER_CONFIG}, or a {SUFFIX} file"
        raise FormatError(path, "adapter", expected=expected, found=found, remedy="check the path")
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(files) != 1 or (path / ADAPTER_CONFIG).is_file():
        return path
    check_files(path, (files[0].name,))
    return files[0]


def local_adapter(adapter: str | os.PathLike[str], *, subfolder: str | None = None, **hub: Any) -> Path:
    """The adapter's directory, or its GGUF file, on this machine; a hub name is downloaded (config and weights only).

    Args:
        hub: arguments of `snapshot_download`.
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
    if folder.is_dir() and not (folder / ADAPTER_CONFIG).is_file():
        raise FormatError(folder, f"no {ADAPTER_CONFIG} in it", remedy="name the directory that save_pretrained wrote")
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


def weights_file(folder: Path) -> Path | None:
    """PEFT's file of an adapter, after a look at all others; None where KTransformers' LoRA of the experts is all.

    Raises:
        FormatError: no adapter's tensors, or files with tensors that are not read.
    """
    check_files(folder)
    for name in (ADAPTER_WEIGHTS, ADAPTER_PICKLE):
        if (folder / name).is_file():
            return folder / name
    if (folder / EXPERTS_NAME).is_file():
        return None
    raise FormatError(folder, "no adapter weights", expected=ADAPTER_WEIGHTS, found="none")


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
    main = ADAPTER_PICKLE if ADAPTER_WEIGHTS not in found else ADAPTER_WEIGHTS
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
