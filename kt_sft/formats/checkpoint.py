"""What lies at a path: config.json and its values, and weights in safetensors, GGUF files or a packed container."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kt_sft.errors import FormatError
from kt_sft.formats.config_values import check_values
from kt_sft.formats.gguf import SUFFIX, GgufIndex
from kt_sft.formats.json_object import read_object
from kt_sft.formats.packed import PackedContainer, is_container
from kt_sft.formats.quantized_index import QuantizedIndex, read_quantization
from kt_sft.formats.safetensors_index import SafetensorsIndex

# In a model directory that was made of GGUF files: which.
GGUF_SOURCES = "kt_sft_gguf.json"
MOST_CONFIG_BYTES = 4 << 20  # the largest that are known have some 600 KB (lists of modules that are not quantised)

SAFETENSORS, GGUF, CONTAINER = QuantizedIndex.kind, GgufIndex.kind, PackedContainer.kind
Weights = QuantizedIndex | GgufIndex | PackedContainer

_LAYERS_IN_A_SECOND = 96
_NUMBER = re.compile(r"\.(\d{1,9})\.")


def config_values(file: Path, tensor_names: Callable[[], Iterable[str]] | None = None) -> dict[str, Any]:
    """Values of a config.json that a model can be built of.

    Args:
        tensor_names: of the weights beside it; asked only where the config has many layers. None: of the safetensors
            files in its directory.
    Raises:
        FormatError: no JSON object, values that no model has, or more layers than the weights beside it.
    """
    values = read_object(file, "config", most_bytes=MOST_CONFIG_BYTES, may_be_infinite=True, remedy="download it again")
    check_values(file, values)
    _check_layers(file, values, tensor_names or (lambda: SafetensorsIndex.from_directory(file.parent)))
    return values


def _check_layers(file: Path, values: dict[str, Any], tensor_names: Callable[[], Iterable[str]]) -> None:
    """Raise where a config.json has more layers than the weights beside it: only building them would show that.

    Those that are built in a second are left to the comparison of every tensor, which follows anyway.

    Raises:
        FormatError: with the numbers of both.
    """
    parts = [values, *(part for part in values.values() if isinstance(part, dict))]
    asked = max((part.get("num_hidden_layers") or 0 for part in parts), default=0)
    if asked <= _LAYERS_IN_A_SECOND:
        return
    try:
        numbers = {int(found[1]) for name in tensor_names() if (found := _NUMBER.search(name))}  # experts' come later
    except FormatError:
        return  # of a model on the hub, or without weights, whoever reads them says so
    if asked > (stored := max(numbers, default=-1) + 1):
        expected = f"at most {stored}, the layers of the weights beside it"
        raise FormatError(file, "num_hidden_layers", expected=expected, found=asked, remedy="download it again")


def kind_at(path: Path) -> str:
    """What kind of weights lie at a path: a container, a GGUF file or a directory with one, or else safetensors."""
    if is_container(path):
        return CONTAINER
    has_safetensors = path.is_dir() and any(path.glob("*.safetensors"))
    if path.suffix == SUFFIX or (path.is_dir() and not has_safetensors and any(path.glob(f"*{SUFFIX}"))):
        return GGUF
    return SAFETENSORS


def open_weights(path: str | Path) -> Weights:
    """What lies at a path, see `kind_at`; its `kind` says what it is. Reads headers only.

    Raises:
        FormatError: nothing there that can be read, or a damaged file.
        UnsupportedModel: a checkpoint that is quantised in a way that is not read.
    """
    path = Path(path)
    kind = kind_at(path)
    if kind == CONTAINER:
        return PackedContainer(path)
    if kind == GGUF:
        return GgufIndex.from_path(path)
    return open_checkpoint(SafetensorsIndex.from_directory(path))


def open_checkpoint(index: SafetensorsIndex) -> QuantizedIndex:
    """A safetensors checkpoint, quantised as the config.json beside it says, if there is one.

    Args:
        index: of its files; taken over.
    Raises:
        FormatError: a damaged config.json, scales missing or of a wrong shape.
        UnsupportedModel: quantised in a way that is not read.
    """
    file = index.source / "config.json"
    values = config_values(file, lambda: index) if file.is_file() else {}
    return QuantizedIndex(index, read_quantization(values.get("quantization_config"), file))


def gguf_sources(folder: Path) -> list[Path]:
    """The GGUF files that a model directory was made of; none for others, and for files that are gone."""
    with suppress(FormatError, KeyError, TypeError):
        files = [Path(name) for name in read_object(folder / GGUF_SOURCES, "GGUF sources")["files"]]
        return [file for file in files if file.is_file()]
    return []
