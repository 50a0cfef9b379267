"""Experts in a packed container: nothing is computed while loading, the kernels work on the file's own bytes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kt_sft.convert.plan import Checkpoint, check_shapes, name_of
from kt_sft.convert.slot import ExpertSlot
from kt_sft.errors import ConfigError, KTError
from kt_sft.formats.packed import MANIFEST_NAME, PackedContainer
from kt_sft.formats.packed_manifest import Manifest
from kt_sft.formats.source_hash import hash_source, is_complete, is_known
from kt_sft.native import native

if TYPE_CHECKING:
    from kt_sft.models.layout import ExpertsSpec, Formats, Matrices
    from kt_sft.sources.protocol import ExpertLayer

logger = logging.getLogger(__name__)


class PackedExperts:
    """An `ExpertSource` over a packed container.

    Args:
        container: taken over.
        weight_load: the setting: experts are copied into memory, or used in the mapped files; see `copies`.
        original: the checkpoint that it was made of, if that is known; merging and saving start from there.
        open_original: opens a checkpoint that it may have been made of; compared with it, and read if it is that one.
        own_files: of the model where they hold the experts in another way (a GGUF file); compared only.
    Raises:
        FormatError: the container belongs to another model.
    """

    kind = PackedContainer.kind
    is_packed = True

    def __init__(
        self,
        container: PackedContainer,
        specs: Mapping[str, ExpertsSpec],
        *,
        weight_load: str,
        original: Checkpoint | None = None,
        open_original: Callable[[], Checkpoint] | None = None,
        own_files: Sequence[Path] = (),
    ):
        self._container = container
        self.path = container.path
        manifest = container.manifest
        check_shapes(manifest, specs, self.path)
        self.files = [self.path / layer.file for layer in manifest.layers.values()]
        self._specs = dict(specs)
        self._original = original
        self._open_original = open_original
        self._own_files = own_files
        self._is_compared = False
        self._is_warned = False
        self._copies = copies(weight_load)
        if self._copies and weight_load == "auto":
            logger.info(
                "weight_load: auto copies the experts of %s to the memory of %d groups of threads; weight_load: mmap "
                "uses the files in place, one copy for all processes",
                self.path,
                native().num_pools(),
            )
        self.formats = {name: (f"packed {manifest.format}",) * 3 for name in specs}

    @property
    def is_mapped(self) -> bool:
        """See `ExpertSource`."""
        return not self._copies

    @property
    def int4_group(self) -> int | None:
        """See `ExpertSource`."""
        return self._container.manifest.group or None

    def native_formats(self, name: str, method: str, group: int) -> Formats:
        """See `ExpertSource`; what is packed is not packed again."""
        manifest = self._container.manifest
        held = name_of(manifest.format, manifest.group)
        wanted = name_of(method.lower(), group if method == "INT4" else 0)
        if held != wanted:
            remedy = f"set method: {manifest.format.upper()}"
            if manifest.format == "int4":
                remedy += f" and int4_group_size: {manifest.group}"
            if method in ("BF16", "INT8", "INT4"):
                remedy += f", or convert the checkpoint to {method.lower()}"
            raise ConfigError(f"method: {wanted} is asked for, but the container {self.path} holds {held}; {remedy}")
        return manifest.format

    def load(self, experts: ExpertLayer, name: str, expert: int, *, slot: int) -> None:
        """See `ExpertSource`."""
        self._compare()
        origin = functools.partial(self._original_of, name, expert)
        experts.load_packed(slot, self._container.blobs(name, expert), copy=self._copies, origin=origin)

    def read(self, name: str, expert: int) -> Matrices:
        """See `ExpertSource`; what is packed."""
        manifest = self._container.manifest
        slot = ExpertSlot(self._specs[name], manifest.format, manifest.group)
        slot.load_packed(0, self._container.blobs(name, expert), copy=True)
        return slot.unpack_expert(0)

    def tensor_names(self, name: str, expert: int) -> tuple[str, str, str]:
        """See `ExpertSource`; the places in a layer's file."""
        layer = self._container.manifest.layers[name]
        gate, up, down = (f"{layer.file} at byte {blob.offset}" for blob in layer.experts[expert])
        return gate, up, down

    def close(self) -> None:
        """See `ExpertSource`; files that experts are mapped from stay mapped."""
        self._container.close()
        if self._original is not None:
            self._original.close()

    def _compare(self) -> None:
        """Once: the container with the model's own files. A warning where they are not those that it was made of."""
        if self._is_compared:
            return
        self._is_compared = True
        manifest = self._container.manifest
        if self._original is not None:  # found by the digests of its files
            self._warn_of_later_files(self._original.files)
            return
        original: Checkpoint | None = None
        if self._open_original is not None:
            with suppress(KTError, OSError):  # a model directory without experts will do
                original = self._open_original()
        files = self._own_files if original is None else original.files
        if not files or not manifest.source_files or not is_known(manifest.source_hash):
            return
        if difference := first_difference(manifest, files):
            text = "the container %s was not made of the model's own files as they are now: %s; experts are taken as "
            text += "they are packed. If the model has changed, convert it again (kt-sft convert --overwrite)"
            logger.warning(text, self.path, difference)
            return
        self._original = original
        self._warn_of_later_files(files)

    def _warn_of_later_files(self, files: Sequence[Path]) -> None:
        """A copy of a checkpoint is newer, too: only where the digests leave something open."""
        how = self._container.manifest.source_hash
        with suppress(OSError):
            made = (self.path / MANIFEST_NAME).stat().st_mtime_ns
            stats = {file: file.stat() for file in files}
            later = [f for f, stat in stats.items() if stat.st_mtime_ns > made and not is_complete(stat.st_size, how)]
            if later:
                text = (
                    "%s was written after the container %s was made; samples of it are as they were then. If it is no "
                )
                text += "copy, compare all of it: kt-sft convert --verify with the same arguments"
                logger.warning(text, later[0], self.path)

    def _original_of(self, name: str, expert: int) -> Matrices:
        self._warn_without_original()
        return self.read(name, expert) if self._original is None else self._original.read(name, expert)

    def _warn_without_original(self) -> None:
        if self._original is None and not self._is_warned:
            self._is_warned = True
            logger.warning(
                "experts are taken as %s rounded them: the checkpoint that the container %s was made of is not the "
                "model's own; give that one as the model to start from its exact weights",
                self._container.manifest.format.upper(),
                self.path,
            )


def first_difference(manifest: Manifest, files: Sequence[Path]) -> str | None:
    """In what files differ from those that a container was made of, in words; None: in nothing that its digests tell.

    Raises:
        FormatError: a file cannot be read.
    """
    held, own = {file.name: file for file in manifest.source_files}, {file.name: file for file in files}
    if held.keys() != own.keys():
        only = min(own.keys() - held.keys(), default=None)
        found = f"it has {only}" if only else f"it has no {min(held.keys() - own.keys())}"
        return f"{found}, and the container is of {min(held)}{f' and {len(held) - 1} more' if len(held) > 1 else ''}"
    for name, path in sorted(own.items()):
        size = path.stat().st_size
        if size != held[name].size:
            return f"{path} has {size} bytes, and had {held[name].size}"
        if hash_source(path, manifest.source_hash) != held[name]:
            return f"{path} has other content"
    return None


def copies(weight_load: str) -> bool:
    """Whether containers are copied into memory: as asked for, and by `auto` for several groups of threads."""
    return weight_load == "copy" or (weight_load == "auto" and native().num_pools() > 1)
