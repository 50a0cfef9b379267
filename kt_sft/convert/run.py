"""Writing a container: one expert at a time, layer by layer, so that a stop at any moment loses one layer's work.

Order of events per layer: blobs into `layer-N.bin.part`, fsync, rename, then one line in the journal, fsync. The
manifest comes last, written aside and renamed; only a folder that has one is a container.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from kt_sft.convert.folder import locked, output_folder, sync_folder
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
from kt_sft.errors import ConfigError, FormatError, OutputError, unpackable
from kt_sft.formats.packed import JOURNAL_NAME, MANIFEST_NAME, layer_header, read_manifest
from kt_sft.formats.packed_manifest import Blob, Manifest, PackedLayer, parse_layer

if TYPE_CHECKING:
    from kt_sft.models.spec import ExpertsSpec

JOURNAL_VERSION = 1
_MANIFEST_PART = f"{MANIFEST_NAME}.part"
# done experts, all experts, name of the layer
Progress = Callable[[int, int, str], None]


def convert(
    source: Experts,
    plan: ConvertPlan,
    *,
    overwrite: bool = False,
    wait: bool = False,
    progress: Progress = lambda done, total, layer: None,
) -> Manifest:
    """Write the container of a plan, or go on with one that was interrupted; a complete one is left as it is.

    Memory: one expert of the source, packed and unpacked; nothing grows with the model.

    Args:
        overwrite: replace a container or an unfinished conversion of other settings or another source.
        wait: for another process that is converting to the same folder; otherwise that is an error.
    Returns:
        The manifest, which is also in the folder.

    Raises:
        ConfigError: the folder holds a container, or a part of one, of other settings or another source.
        OutputError: no space, another process at work, or a folder that cannot be written.
        FormatError: the source is damaged, changed, or has weights that cannot be packed.
    """
    folder = plan.output
    try:
        if not overwrite and (manifest := finished_manifest(plan)) is not None:  # before anything is written
            with contextlib.suppress(OSError), locked(folder, wait=False):  # it may be on a read-only disk
                _tidy(folder, manifest)
            return manifest
        with output_folder(folder, wait):
            if not overwrite and (manifest := finished_manifest(plan)) is not None:
                _tidy(folder, manifest)
                return manifest
            with _clear(plan) if overwrite else contextlib.nullcontext():
                return _write(source, plan, progress)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise _not_written(folder, error) from error


def append_layer(source: Experts, plan: AppendPlan) -> Manifest:
    """Write one layer and put it into the manifest, in place of one of the same name; makes the container if need be.

    At any moment the folder holds a container of the layers before, or of those and this one.

    Raises:
        ConfigError: the folder holds a container of another format, or one that was converted from a checkpoint.
        OutputError: other files, or a folder that cannot be written.
        FormatError: a damaged manifest; weights that cannot be packed.
    """
    folder = plan.output
    try:
        with output_folder(folder, wait=True):
            layers = _appendable_layers(plan)
            # A layer that is replaced keeps its file until the manifest names the new one.
            plan = dataclasses.replace(plan, number=_free_number(plan.number, layers))
            layers[plan.name] = _write_layer(source, plan, plan.name, plan.spec, lambda done: None)
            ordered = {name: layers[name] for name in sorted(layers, key=_by_number)}
            manifest = Manifest(plan.identity, plan.weight_format, plan.group, "", ("tensors",), (), ordered)
            _publish(folder, manifest)
            return manifest
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise _not_written(folder, error) from error


def _appendable_layers(plan: AppendPlan) -> dict[str, PackedLayer]:
    names = set(os.listdir(plan.output)) - {LOCK_NAME}
    if MANIFEST_NAME not in names:
        # The others are of a first layer that was cut off.
        strangers = sorted(name for name in names if not name.startswith("layer-") and name != _MANIFEST_PART)
        if strangers:
            raise OutputError(
                plan.output,
                "output",
                expected="a container, or a new or empty directory",
                found=f"{len(strangers)} files, {strangers[0]} among them",
                remedy="choose another",
            )
        return {}
    manifest = read_manifest(plan.output)
    if manifest.identity != plan.identity:
        held = name_of(manifest.weight_format, manifest.group)
        raise ConfigError(
            f"{plan.output}: expected a container of layers from tensors in "
            f"{name_of(plan.weight_format, plan.group)}, found {held} with {len(manifest.layers)} layers "
            f"{'from tensors' if not manifest.source_files else 'from a checkpoint'}; choose another"
        )
    return dict(manifest.layers)


def _free_number(number: int, layers: Mapping[str, PackedLayer]) -> int:
    """The number, or the highest one, that names no file of these layers."""
    held = {layer.file for layer in layers.values()}
    return next(n for n in (number, *range(99_999, -1, -1)) if f"layer-{n:05d}.bin" not in held)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts `model.layers.10` behind `model.layers.9`."""
    return [(int(part) if part.isdigit() else -1, part) for part in name.split(".")]


def _write(source: Experts, plan: ConvertPlan, progress: Progress) -> Manifest:
    folder = plan.output
    layers = _finished_layers(plan)
    check_space(plan, layers)
    with _journal(plan, has_content=bool(layers)) as journal:
        done = sum(layer.num_experts for layer in layers.values())
        for name, spec in plan.specs.items():
            if name in layers:
                continue
            count = functools.partial(_count, progress, done, plan.num_experts, name)
            layers[name] = _write_layer(source, plan, name, spec, count)
            done += spec.num_experts
            source.close()
            _append(journal, layers[name].to_json())
    manifest = Manifest(
        plan.identity,
        plan.weight_format,
        plan.group,
        plan.model_type,
        plan.source_formats,
        plan.source_files,
        {name: layers[name] for name in plan.specs},
    )
    _publish(folder, manifest)
    return manifest


def _count(progress: Progress, before: int, total: int, layer: str, more: int) -> None:
    progress(before + more, total, layer)


def _write_layer(
    source: Experts, plan: LayerPlan, name: str, spec: ExpertsSpec, progress: Callable[[int], None]
) -> PackedLayer:
    path = plan.output / plan.file_names[name]
    part = path.with_suffix(".bin.part")
    file_bytes = plan.layer_bytes(name)
    slot = ExpertSlot(spec, plan.weight_format, plan.group)
    experts = []
    with part.open("wb") as stream:
        stream.write(layer_header(plan.identity, name, file_bytes))
        for expert in range(spec.num_experts):
            matrices = source.read(name, expert)
            try:
                slot.load_expert(0, *matrices)
            except ValueError as error:
                raise unpackable(source, name, expert, error, instead="convert to bf16") from None
            experts.append(_write_expert(stream, slot.export(), slot.errors(matrices)))
            progress(expert + 1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)
    sync_folder(plan.output)
    sizes = (spec.num_experts, spec.hidden, spec.inter, spec.activation)
    return PackedLayer(name, *sizes, path.name, file_bytes, tuple(experts))


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
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    start = _parsed(lines[0])
    if start is None and len(lines) == 1:
        return {}  # stopped while the very first line was written
    if not isinstance(start, dict) or start.get("id") != plan.identity or start.get("version") != JOURNAL_VERSION:
        began = start.get("weights") if isinstance(start, dict) else None
        now = name_of(plan.weight_format, plan.group)
        reason = f"to {began} where {now} is asked for" if began not in (None, now) else "from other source files"
        raise ConfigError(
            f"{plan.output}: holds an unfinished conversion {reason}; repeat its settings to finish it, choose another "
            "output, or start anew with --overwrite"
        )
    layers: dict[str, PackedLayer] = {}
    for line in lines[1:]:
        with contextlib.suppress(FormatError):
            layer = parse_layer(_parsed(line), path, plan.weight_format, plan.group)
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


@contextlib.contextmanager
def _journal(plan: ConvertPlan, *, has_content: bool) -> Iterator[IO[bytes]]:
    """Open for appending; started over unless it has finished layers."""
    path = plan.output / JOURNAL_NAME
    if not has_content:
        path.unlink(missing_ok=True)
    with path.open("ab") as stream:
        if stream.tell() == 0:
            weights = name_of(plan.weight_format, plan.group)
            _append(stream, {"version": JOURNAL_VERSION, "id": plan.identity, "weights": weights})
            sync_folder(plan.output)
        else:
            stream.write(b"\n")  # ends a torn line; an empty one means nothing
        yield stream


def _append(stream: IO[bytes], values: dict[str, Any]) -> None:
    stream.write(json.dumps(values).encode() + b"\n")
    stream.flush()
    os.fsync(stream.fileno())


def _publish(folder: Path, manifest: Manifest) -> None:
    part = folder / _MANIFEST_PART
    with part.open("wb") as stream:
        stream.write(manifest.dumps())
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, folder / MANIFEST_NAME)
    sync_folder(folder)
    _tidy(folder, manifest)


def _tidy(folder: Path, manifest: Manifest) -> None:
    """Remove what a finished container does not need, of this conversion or an earlier one."""
    (folder / JOURNAL_NAME).unlink(missing_ok=True)
    held = {layer.file for layer in manifest.layers.values()}
    for stray in [*folder.glob("layer-*.bin"), *folder.glob("layer-*.bin.part")]:
        if stray.name not in held:
            stray.unlink()


@contextlib.contextmanager
def _clear(plan: ConvertPlan) -> Iterator[None]:
    """Make the folder no container, so that nobody takes old and new files for one; what was begun by the same command
    is kept.

    Processes that have mapped the old files keep them: files are replaced by new ones, never written over. A failure
    before the first of them is replaced gives the old container back.

    Raises:
        OutputError: it holds files of others.
    """
    folder = plan.output
    names = set(os.listdir(folder)) - {LOCK_NAME}
    check_own_files(folder, names, "a container to overwrite")
    if MANIFEST_NAME not in names and _is_begun(plan):
        yield
        return
    old, stamps = _old_container(folder) if MANIFEST_NAME in names else (None, {})
    for name in (JOURNAL_NAME, MANIFEST_NAME):  # the manifest last: until then it is the old container, and whole
        (folder / name).unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if old is not None and stamps == {name: _stamp(folder / name) for name in stamps}:
                (folder / JOURNAL_NAME).unlink(missing_ok=True)
                (folder / _MANIFEST_PART).write_bytes(old)
                os.replace(folder / _MANIFEST_PART, folder / MANIFEST_NAME)
        raise


def _is_begun(plan: ConvertPlan) -> bool:
    """Whether the journal in the folder, if there is one, is of this conversion."""
    try:
        _finished_layers(plan)
    except ConfigError:
        return False
    return True


def _old_container(folder: Path) -> tuple[bytes | None, dict[str, tuple[int, int]]]:
    """The manifest of a container, and what tells its files from others of the same names; None: it is damaged."""
    with contextlib.suppress(OSError, FormatError):
        stamps = {layer.file: _stamp(folder / layer.file) for layer in read_manifest(folder).layers.values()}
        return (folder / MANIFEST_NAME).read_bytes(), stamps
    return None, {}


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _not_written(folder: Path, error: OSError) -> OutputError:
    cure = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "correct that"
    return OutputError(
        error.filename or folder,
        "writing the container",
        found=error.strerror or str(error),
        remedy=f"{cure} and run the same command again: finished layers are kept",
    )
