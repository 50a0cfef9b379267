"""Experts in a packed container: nothing is computed while loading, the kernels work on the file's own bytes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kt_sft.config import KTConfig
from kt_sft.convert.plan import Checkpoint, Experts, check_shapes, name_of
from kt_sft.convert.slot import ExpertSlot
from kt_sft.errors import ConfigError, KTError
from kt_sft.formats.packed import PackedContainer, hash_source
from kt_sft.native import native

if TYPE_CHECKING:
    from kt_sft.models.spec import ExpertsSpec
    from kt_sft.nn.routed_experts import Matrices, RoutedExperts

logger = logging.getLogger(__name__)


class PackedExperts:
    """An `ExpertSource` over a packed container.

    Args:
        directory: the container.
        original: the checkpoint that it was made of, if that is known; merging and saving start from there.
        open_original: opens a checkpoint that it may have been made of; called and compared when it is needed.
    Raises:
        FormatError: the container is damaged or belongs to another model.
        ConfigError: its weight format is not the one asked for, or `weight_load: mmap` with several groups of threads.
    """

    def __init__(
        self,
        directory: str | Path,
        specs: Mapping[str, ExpertsSpec],
        config: KTConfig,
        *,
        original: Experts | None = None,
        open_original: Callable[[], Checkpoint] | None = None,
    ):
        self._container = PackedContainer(directory)
        self.path = self._container.path
        manifest = self._container.manifest
        check_shapes(manifest, specs, self.path)
        check_format(self._container, config)
        self._specs = dict(specs)
        self._original = original
        self._open_original = open_original
        self._has_looked = False
        self._copies = copies(config)
        self.formats = {name: (f"packed {manifest.weight_format}",) * 3 for name in specs}

    def load(self, experts: RoutedExperts, name: str, expert: int, *, slot: int | None = None) -> None:
        """See `ExpertSource`."""
        origin = functools.partial(self._original_of, name, expert)
        slot = expert if slot is None else slot
        experts.load_packed(slot, self._container.blobs(name, expert), copy=self._copies, origin=origin)

    def read(self, name: str, expert: int) -> Matrices:
        """See `ExpertSource`; what is packed."""
        manifest = self._container.manifest
        slot = ExpertSlot(self._specs[name], manifest.weight_format, manifest.group)
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

    def _find_original(self) -> Experts | None:
        """The model's own checkpoint if the container was made of it: names, sizes and digests of files agree."""
        if self._open_original is None:
            return None
        with suppress(KTError, OSError):  # a model directory without experts will do
            original = self._open_original()
            files, held = original.files, self._container.manifest.source_files
            sizes = {(file.name, file.stat().st_size) for file in files}
            if sizes == {(file.name, file.size) for file in held} and {hash_source(f) for f in files} == set(held):
                return original
        return None

    def _original_of(self, name: str, expert: int) -> Matrices:
        if self._original is None and not self._has_looked:
            self._has_looked = True  # now, since hashing files takes time that most runs can spare
            self._original = self._find_original()
            self._warn_without_original()
        return self.read(name, expert) if self._original is None else self._original.read(name, expert)

    def _warn_without_original(self) -> None:
        if self._original is None:
            logger.warning(
                "experts are taken as %s rounded them: the checkpoint that the container %s was made of is not the "
                "model's own; give that one as the model to start from its exact weights",
                self._container.manifest.weight_format.upper(),
                self.path,
            )


def copies(config: KTConfig) -> bool:
    """Whether containers are copied into memory.

    Raises:
        ConfigError: `weight_load: mmap` where each pool of threads needs a part of its own.
    """
    pools = native().num_pools()
    if config.weight_load == "mmap" and pools > 1:
        raise ConfigError(
            f"weight_load: mmap needs one group of threads, found {pools}, whose shares of the experts are copied to "
            "their NUMA nodes; set weight_load: copy or auto, or threadpool_count: 1"
        )
    return config.weight_load == "copy" or pools > 1


def check_format(container: PackedContainer, config: KTConfig) -> None:
    """Raise unless the container holds the format that the settings ask for.

    Raises:
        ConfigError: names both.
    """
    manifest = container.manifest
    held, group = name_of(manifest.weight_format, manifest.group), config.int4_group_size
    wanted = name_of(config.weight_format, group if config.weight_format == "int4" else 0)
    if held != wanted:
        remedy = f"set method: {manifest.weight_format.upper()}"
        if manifest.weight_format == "int4":
            remedy += f" and int4_group_size: {manifest.group}"
        if config.method in ("BF16", "INT8", "INT4"):
            remedy += f", or convert the checkpoint to {config.weight_format}"
        raise ConfigError(f"method: {wanted} is asked for, but the container {container.path} holds {held}; {remedy}")
