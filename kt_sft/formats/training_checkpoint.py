"""Checkpoints of transformers' trainer on disk: `checkpoint-N` directories, and whether one is whole.

A process that is killed while it saves leaves files that end early or are missing. Whoever wrote the checkpoint, that
can be seen without reading the data: a safetensors header says how long the file must be, torch's files are zip
archives whose directory comes last, and `trainer_state.json` is written after everything else.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path

from kt_sft.errors import FormatError
from kt_sft.formats.file_names import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS
from kt_sft.formats.safetensors_index import SafetensorsIndex

STATE_NAME = "trainer_state.json"
OPTIMIZER_NAME, SCHEDULER_NAME = "optimizer.pt", "scheduler.pt"
_NAME = re.compile(r"checkpoint-(\d+)")
_RNG = re.compile(r"rng_state(_\d+)?\.pth")
_ZIPPED = (".pt", ".pth")


def checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-N` directories in a run's output directory, highest step first."""
    found = [(int(match[1]), path) for path, match in _named(folder) if path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def newest_whole(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """The checkpoint with the highest step that is whole, and why those above it are not, by name."""
    broken = {}
    for path in checkpoints(folder):
        fault = find_fault(path)
        if fault is None:
            return path, broken
        broken[path.name] = fault
    return None, broken


def find_fault(checkpoint: Path) -> str | None:
    """What a checkpoint lacks, in words; None if it is whole. Reads headers and the small JSON files only."""
    for name in (STATE_NAME, ADAPTER_CONFIG):
        if fault := _json_fault(checkpoint / name):
            return fault
    if fault := _adapter_fault(checkpoint):
        return fault
    if (checkpoint / OPTIMIZER_NAME).is_file() and not (checkpoint / SCHEDULER_NAME).is_file():
        return f"{SCHEDULER_NAME} is missing"
    for path in sorted(checkpoint.iterdir()):
        if path.suffix in _ZIPPED and not _is_whole_zip(path):
            return f"{path.name} ends early"
    return _deepspeed_fault(checkpoint)


def num_ranks(checkpoint: Path) -> int | None:
    """Processes that wrote a checkpoint, by their random states; None if there are none in it."""
    return sum(_RNG.fullmatch(path.name) is not None for path in checkpoint.iterdir()) or None


def step_of(checkpoint: Path) -> int | None:
    """The step at which a whole checkpoint was written; None if its state does not say."""
    step = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8")).get("global_step")
    return step if type(step) is int else None


def is_deepspeed(checkpoint: Path) -> bool:
    """Whether DeepSpeed keeps its own copy of the trained weights in it."""
    return (checkpoint / "latest").is_file()


def _named(folder: Path) -> list[tuple[Path, re.Match]]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return [(path, match) for path in paths if (match := _NAME.fullmatch(path.name))]


def _json_fault(path: Path) -> str | None:
    if not path.is_file():  # reading from a pipe or a device would not end
        return f"{path.name} is {'no regular file' if os.path.lexists(path) else 'missing'}"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        return f"{path.name} is empty" if not path.stat().st_size else f"{path.name} ends early"
    return None if isinstance(value, dict) else f"{path.name} holds no object"


def _adapter_fault(checkpoint: Path) -> str | None:
    if (checkpoint / ADAPTER_WEIGHTS).is_file():
        try:
            SafetensorsIndex.from_files([checkpoint / ADAPTER_WEIGHTS]).close()
        except FormatError:
            return f"{ADAPTER_WEIGHTS} ends early"
        return None
    pickled = checkpoint / ADAPTER_PICKLE
    if not pickled.is_file():
        return f"{ADAPTER_WEIGHTS} is missing"
    return None if _is_whole_zip(pickled) else f"{ADAPTER_PICKLE} ends early"


def _is_whole_zip(path: Path) -> bool:
    """Whether torch wrote the file to its end, where the archive's directory is."""
    if not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return bool(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):  # the last: of a later version of zip
        return False


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that no filesystem takes
        return False


def _deepspeed_fault(checkpoint: Path) -> str | None:
    if not is_deepspeed(checkpoint):
        return None
    name = (checkpoint / "latest").read_bytes()[:256].strip().decode("utf-8", errors="replace")
    folder = checkpoint / name
    if "/" in name or not _is_dir(folder) or folder in (checkpoint, checkpoint / ".."):
        return "the folder that its file `latest` names is missing"
    files = sorted(folder.glob("*.pt"))
    if not any("model_states" in path.name for path in files):
        return f"{folder.name} holds no model states"
    early = next((path.name for path in files if not _is_whole_zip(path)), None)
    return f"{folder.name}/{early} ends early" if early else None
