"""What a conversion will write, known before it writes: layers, sizes, identity, and faults of the output folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kt_sft.errors import GIB, ConfigError, FormatError, OutputError
from kt_sft.formats.disk import free_bytes
from kt_sft.formats.packed import JOURNAL_NAME, MANIFEST_NAME, read_manifest
from kt_sft.formats.packed_manifest import HEADER_BYTES, LAYOUT_ID, SOURCE_HASH, Manifest, SourceFile, blob_sizes
from kt_sft.formats.source_hash import hash_source, is_known

if TYPE_CHECKING:
    from torch import Tensor

    from kt_sft.models.layout import ExpertsSpec

LOCK_NAME = "convert.lock"
# Left free on the disk for the manifest, the journal and everybody else.
_SPARE_BYTES = 64 << 20
_OWN_FILES = re.compile(r"layer-\d{5,}\.bin(\.part)?|(manifest\.json|convert-journal\.jsonl)\.part")


class Experts(Protocol):
    """What a conversion asks of the source of the experts; an `ExpertSource` has it."""

    @property
    def path(self) -> Path: ...

    @property
    def formats(self) -> Mapping[str, tuple[str, str, str]]: ...

    def read(self, name: str, expert: int) -> tuple[Tensor, Tensor, Tensor]: ...

    def tensor_names(self, name: str, expert: int) -> tuple[str, str, str]: ...

    def close(self) -> None: ...


class Checkpoint(Experts, Protocol):
    """The same of a source in files."""

    @property
    def files(self) -> Sequence[Path]: ...


class LayerPlan(Protocol):
    """What writing one layer asks of a plan."""

    output: Path
    format: str
    group: int

    @property
    def identity(self) -> str: ...

    def layer_bytes(self, name: str) -> int: ...


@dataclass(frozen=True)
class ConvertPlan:
    """One conversion. `specs` by module name, in the order of the model; `group` is 0 but for int4.

    Args:
        source_paths: of the source files, in the same order.
    """

    output: Path
    format: str
    group: int
    model_type: str
    source_formats: tuple[str, ...]
    source_files: tuple[SourceFile, ...]
    specs: Mapping[str, ExpertsSpec]
    source_paths: tuple[Path, ...] = ()

    def hashed(self, how: str) -> ConvertPlan:
        """The plan with digests as a container has them that an earlier release wrote."""
        if how == SOURCE_HASH or not is_known(how):
            return self
        return dataclasses.replace(self, source_files=tuple(hash_source(path, how) for path in self.source_paths))

    @property
    def identity(self) -> str:
        """Digest of everything that decides what the container holds."""
        shapes = [[name, s.num_experts, s.hidden, s.inter, s.activation] for name, s in self.specs.items()]
        files = [[file.name, file.size, file.digest] for file in self.source_files]
        what = [LAYOUT_ID, self.format, self.group, self.model_type, files, shapes]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    @property
    def num_experts(self) -> int:
        """Of all layers."""
        return sum(spec.num_experts for spec in self.specs.values())

    def layer_bytes(self, name: str) -> int:
        """Length of a layer's blob file."""
        return file_bytes(self.specs[name], self.format, self.group)

    @property
    def blob_bytes(self) -> int:
        """Of all blob files."""
        return sum(map(self.layer_bytes, self.specs))


@dataclass(frozen=True)
class AppendPlan:
    """One more layer of a container whose experts come from tensors; `group` is 0 but for int4."""

    output: Path
    format: str
    group: int
    name: str
    spec: ExpertsSpec
    number: int

    @property
    def identity(self) -> str:
        """That of all such containers of one format."""
        return hashlib.sha256(json.dumps([LAYOUT_ID, self.format, self.group, "tensors"]).encode()).hexdigest()

    def layer_bytes(self, name: str) -> int:
        """Length of the blob file."""
        return file_bytes(self.spec, self.format, self.group)


def file_bytes(spec: ExpertsSpec, format: str, group: int) -> int:
    """Length of a layer's blob file."""
    return HEADER_BYTES + spec.num_experts * sum(blob_sizes(format, group, spec.hidden, spec.inter))


def plan_conversion(
    source: Checkpoint,
    specs: Mapping[str, ExpertsSpec],
    output: str | os.PathLike[str],
    format: str,
    group: int,
    model_type: str,
) -> ConvertPlan:
    """Plan a conversion; reads headers and the ends of the source's files only.

    Raises:
        FormatError: a file of the source cannot be read any more.
    """
    formats = sorted({name for names in source.formats.values() for name in names})
    paths = tuple(source.files)
    files = tuple(map(hash_source, paths))
    group = group if format == "int4" else 0
    return ConvertPlan(Path(output), format, group, model_type, tuple(formats), files, dict(specs), paths)


def finished_manifest(plan: ConvertPlan) -> Manifest | None:
    """The manifest of the output folder if it holds a container already; None if there is something to do.

    Raises:
        FormatError: what is there is damaged.
        ConfigError: it is a container of other settings or another source.
        OutputError: the folder holds other files.
    """
    folder = plan.output
    try:
        names = set(os.listdir(folder)) - {LOCK_NAME}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(
            folder, "output", expected="a directory", found=error.strerror, remedy="choose another"
        ) from None
    if MANIFEST_NAME in names:
        manifest = read_manifest(folder)
        plan = plan.hashed(manifest.source_hash)
        if manifest.identity != plan.identity:
            raise ConfigError(
                f"{folder}: holds a finished container of {describe_difference(manifest, plan)}; choose another "
                "output, or replace it with --overwrite"
            )
        return manifest
    check_own_files(folder, names, "a new or empty directory, or an unfinished conversion")
    return None


def check_own_files(
    folder: Path, names: set[str], expected: str, records: Set[str] = frozenset({MANIFEST_NAME, JOURNAL_NAME})
) -> None:
    """Raise if a folder holds none of a conversion's records but other files; layers alone are left of a stop.

    Args:
        records: names that say whose the folder is.
    Raises:
        OutputError: names one of them.
    """
    strangers = sorted(name for name in names if not _OWN_FILES.fullmatch(name))
    if strangers and not names & records:
        found = f"{len(strangers)} files, {strangers[0]} among them"
        raise OutputError(folder, "output", expected=expected, found=found, remedy="choose another")


def describe_difference(other: Manifest, plan: ConvertPlan) -> str:
    """In what a container's manifest differs from a plan."""
    if (other.format, other.group) != (plan.format, plan.group):
        return f"{name_of(other.format, other.group)}, not {name_of(plan.format, plan.group)}"
    if other.source_files != plan.source_files:
        return "other source files"
    return "another model"


def name_of(format: str, group: int) -> str:
    """`int4 in groups of 32`."""
    return f"{format} in groups of {group}" if format == "int4" else format


def check_space(plan: ConvertPlan, finished: Iterable[str]) -> None:
    """Raise unless what is still to be written fits.

    Raises:
        OutputError: needed and free bytes.
    """
    done = set(finished)
    needed = _SPARE_BYTES + sum(plan.layer_bytes(name) for name in plan.specs if name not in done)
    free, is_there = free_bytes(plan.output), (plan.output / MANIFEST_NAME).exists()
    if needed > free:
        raise OutputError(
            plan.output,
            "disk space for the container",
            expected=f"{needed / GIB:.2f} GiB",
            found=f"{free / GIB:.2f} GiB free",
            remedy="free space, choose an output on another disk, or a smaller format"
            + ("; the old container is kept until the new one is whole" if is_there else ""),
        )


def check_shapes(manifest: Manifest, specs: Mapping[str, ExpertsSpec], path: Path) -> None:
    """Raise unless a container holds the experts of a model.

    Raises:
        FormatError: layers missing or of another shape, or an unknown one.
    """
    remedy = "the container belongs to another model; convert this one's checkpoint"
    for name, spec in specs.items():
        layer = manifest.layers.get(name)
        if layer is None:
            found = f"layers such as {next(iter(manifest.layers))}"
            raise FormatError(path, f"experts of {name}", expected="present", found=found, remedy=remedy)
        sizes = (spec.num_experts, spec.hidden, spec.inter, spec.activation)
        held = (layer.num_experts, layer.hidden, layer.inter, layer.activation)
        if sizes != held:
            what = "(experts, hidden, inter, activation)"
            raise FormatError(path, f"experts of {name}, {what}", expected=sizes, found=held, remedy=remedy)
    if extra := [name for name in manifest.layers if name not in specs]:
        raise FormatError(
            path, f"experts of {extra[0]}", expected="only the model's layers", found="one more", remedy=remedy
        )
