"""Writing a container: one expert at a time, layer by layer, so that a stop at any moment loses one layer's work.

Order of events per layer: its blobs, then the journal with one more line. The manifest comes last; only a folder that
has one is a container. Each is written aside, flushed and renamed. An overwrite writes its layers under names that the
old container has not taken: until the new manifest is there it is the old container, and whole.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from kt_sft.convert.folder import files_of, locked, output_folder
from kt_sft.convert.plan import (
    LOCK_NAME,
    AppendPlan,
    ConvertPlan,
    Experts,
    LayerPlan,
    check_own_files,
    check_space,
    finished_manifest,
    name_of,
)
from kt_sft.convert.slot import ExpertSlot
from kt_sft.errors import ConfigError, FormatError, packing
from kt_sft.formats.disk import reporting
from kt_sft.formats.packed import JOURNAL_NAME, MANIFEST_NAME, layer_header, read_manifest
from kt_sft.formats.packed_manifest import Blob, Manifest, PackedLayer, parse_layer
from kt_sft.formats.staging import part_of, read_own
from kt_sft.progress import Move, no_bar

if TYPE_CHECKING:
    from kt_sft.models.layout import ExpertsSpec

JOURNAL_VERSION = 1
_WRITING, _GOES_ON = "writing the container", " and run the same command again: finished layers are kept"
_PARTS = (f"{MANIFEST_NAME}.part", f"{JOURNAL_NAME}.part")


def convert(
    source: Experts,
    plan: ConvertPlan,
    *,
    overwrite: bool = False,
    wait: bool = False,
    progress: Move = no_bar,
) -> Manifest:
    """Write the container of a plan, or go on with one that was interrupted; a complete one is left as it is.

    Memory: one expert of the source, packed and unpacked; nothing grows with the model.

    Args:
        overwrite: replace a container or an unfinished conversion of other settings or another source; the old
            container is kept until the new one is whole.
        wait: for another process that is converting to the same folder; otherwise that is an error.
    Returns:
        The manifest, which is also in the folder.

    Raises:
        ConfigError: the folder holds a container, or a part of one, of other settings or another source.
        OutputError: no space, another process at work, or a folder that cannot be written.
        FormatError: the source is damaged, changed, or has weights that cannot be packed.
    """
    folder = plan.output
    with reporting(folder, _WRITING, _GOES_ON, libraries=False):
        if not overwrite and (manifest := finished_manifest(plan)) is not None:  # before anything is written
            if _strays(folder, {layer.file for layer in manifest.layers.values()}):
                with contextlib.suppress(OSError), locked(folder, wait=False):  # it may be on a read-only disk
                    _tidy(folder)
            return manifest
        with output_folder(folder, wait):
            if not overwrite and (manifest := finished_manifest(plan)) is not None:
                _tidy(folder)
                return manifest
            if overwrite:
                _begin_anew(plan)
            return _write(source, plan, progress)


def append_layer(source: Experts, plan: AppendPlan) -> Manifest:
    """Write one layer and put it into the manifest, in place of one of the same name; makes the container if need be.

    At any moment the folder holds a container of the layers before, or of those and this one.

    Raises:
        ConfigError: the folder holds a container of another format, or one that was converted from a checkpoint.
        OutputError: other files, or a folder that cannot be written.
        FormatError: a damaged manifest; weights that cannot be packed.
    """
    folder = plan.output
    with reporting(folder, _WRITING, _GOES_ON, libraries=False), output_folder(folder, wait=True):
        layers = _appendable_layers(plan)
        # A layer that is replaced keeps its file until the manifest names the new one.
        file = _free_file(plan.number, {layer.file for layer in layers.values()})
        layers[plan.name] = _write_layer(source, plan, (plan.name, plan.spec), file, lambda done: None)
        ordered = {name: layers[name] for name in sorted(layers, key=_by_number)}
        manifest = Manifest(plan.identity, plan.format, plan.group, "", ("tensors",), (), ordered)
        _publish(folder, manifest)
        return manifest


def _appendable_layers(plan: AppendPlan) -> dict[str, PackedLayer]:
    names = set(os.listdir(plan.output)) - {LOCK_NAME}
    if MANIFEST_NAME not in names:
        # What else is ours is of a first layer that was cut off; a journal is of a conversion.
        check_own_files(plan.output, names, "a container, or a new or empty directory", records=set())
        return {}
    manifest = read_manifest(plan.output)
    if manifest.identity != plan.identity:
        held = name_of(manifest.format, manifest.group)
        raise ConfigError(
            f"{plan.output}: expected a container of layers from tensors in "
            f"{name_of(plan.format, plan.group)}, found {held} with {len(manifest.layers)} layers "
            f"{'from tensors' if not manifest.source_files else 'from a checkpoint'}; choose another"
        )
    return dict(manifest.layers)


def _free_file(number: int, held: Collection[str]) -> str:
    """The file of a layer: that of its number, or the next one that is free."""
    return next(file for n in itertools.count(number) if (file := f"layer-{n:05d}.bin") not in held)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts `model.layers.10` behind `model.layers.9`."""
    return [(int(part) if part.isdigit() else -1, part) for part in name.split(".")]


def _write(source: Experts, plan: ConvertPlan, progress: Move) -> Manifest:
    folder = plan.output
    layers = _finished_layers(plan)
    check_space(plan, layers)
    _write_journal(plan, layers)
    held = files_of(folder)
    done = sum(layer.num_experts for layer in layers.values())
    for number, (name, spec) in enumerate(plan.specs.items()):
        if name in layers:
            continue
        count = functools.partial(_count, progress, done, plan.num_experts, name)
        file = _free_file(number, held | {layer.file for layer in layers.values()})
        layers[name] = _write_layer(source, plan, (name, spec), file, count)
        done += spec.num_experts
        source.close()
        _write_journal(plan, layers)
    manifest = Manifest(
        plan.identity,
        plan.format,
        plan.group,
        plan.model_type,
        plan.source_formats,
        plan.source_files,
        {name: layers[name] for name in plan.specs},
    )
    _publish(folder, manifest)
    return manifest


def _count(progress: Move, before: int, total: int, layer: str, more: int) -> None:
    progress(before + more, total, layer)


def _write_layer(
    source: Experts, plan: LayerPlan, layer: tuple[str, ExpertsSpec], file: str, progress: Callable[[int], None]
) -> PackedLayer:
    name, spec = layer
    file_bytes = plan.layer_bytes(name)
    slot = ExpertSlot(spec, plan.format, plan.group)
    experts = []
    with part_of(plan.output / file) as stream:
        stream.write(layer_header(plan.identity, name, file_bytes))
        for expert in range(spec.num_experts):
            matrices = source.read(name, expert)
            with packing(source, name, expert, instead="convert to bf16"):
                slot.load_expert(0, *matrices)
            experts.append(_write_expert(stream, slot.export(), slot.errors(matrices)))
            progress(expert + 1)
    sizes = (spec.num_experts, spec.hidden, spec.inter, spec.activation)
    return PackedLayer(name, *sizes, file, file_bytes, tuple(experts))


def _write_expert(
    stream: IO[bytes], blobs: tuple[np.ndarray, ...], errors: tuple[float, ...]
) -> tuple[Blob, Blob, Blob]:
    written = []
    for data, error in zip(blobs, errors):
        offset = stream.tell()
        stream.write(data.data)
        written.append(Blob(offset, data.size, zlib.crc32(data.data), float(f"{error:.6g}")))
    gate, up, down = written
    return gate, up, down


def _finished_layers(plan: ConvertPlan) -> dict[str, PackedLayer]:
    """Layers that the journal lists and whose files are there; a torn last line is a layer that was not finished.

    Raises:
        ConfigError: the journal is that of another conversion.
    """
    path = plan.output / JOURNAL_NAME
    try:
        lines = read_own(path).split(b"\n")
    except FileNotFoundError:
        return {}
    start = _parsed(lines[0])
    if start is None and len(lines) == 1:
        return {}  # stopped while the very first line was written
    if not isinstance(start, dict) or start.get("id") != plan.identity or start.get("version") != JOURNAL_VERSION:
        began = start.get("weights") if isinstance(start, dict) else None
        now = name_of(plan.format, plan.group)
        reason = f"to {began} where {now} is asked for" if began not in (None, now) else "from other source files"
        raise ConfigError(
            f"{plan.output}: holds an unfinished conversion {reason}; repeat its settings to finish it, choose another "
            "output, or start anew with --overwrite"
        )
    layers: dict[str, PackedLayer] = {}
    for line in lines[1:]:
        with contextlib.suppress(FormatError):
            layer = parse_layer(_parsed(line), path, plan.format, plan.group)
            if layer.name in plan.specs and _has_size(plan.output / layer.file, layer.file_bytes):
                layers[layer.name] = layer
    return layers


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _write_journal(plan: ConvertPlan, layers: Mapping[str, PackedLayer]) -> None:
    weights = name_of(plan.format, plan.group)
    start = {"version": JOURNAL_VERSION, "id": plan.identity, "weights": weights}
    with part_of(plan.output / JOURNAL_NAME) as stream:
        for values in (start, *(layer.to_json() for layer in layers.values())):
            stream.write(json.dumps(values).encode() + b"\n")


def _publish(folder: Path, manifest: Manifest) -> None:
    with part_of(folder / MANIFEST_NAME) as stream:
        stream.write(manifest.dumps())
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Remove what the container in the folder does not need, of its conversion or another one."""
    for stray in _strays(folder, files_of(folder)):
        stray.unlink(missing_ok=True)


def _strays(folder: Path, held: Collection[str]) -> list[Path]:
    """Files of conversions in a folder that are none of a container's.

    Args:
        held: names of the container's layers.
    """
    rest = [folder / name for name in (JOURNAL_NAME, *_PARTS) if os.path.lexists(folder / name)]
    layers = [*folder.glob("layer-*.bin"), *folder.glob("layer-*.bin.part")]
    return rest + [path for path in layers if path.name not in held]


def _begin_anew(plan: ConvertPlan) -> None:
    """Keep of the folder a container, and what was begun by the same command.

    Processes that have mapped files keep them: files are replaced by new ones, never written over.

    Raises:
        OutputError: it holds files of others.
    """
    folder = plan.output
    check_own_files(folder, set(os.listdir(folder)) - {LOCK_NAME}, "a container to overwrite")
    if not _is_begun(plan):
        _tidy(folder)


def _is_begun(plan: ConvertPlan) -> bool:
    """Whether there is a journal in the folder, of this conversion."""
    try:
        return bool(_finished_layers(plan))
    except (ConfigError, OSError):
        return False
