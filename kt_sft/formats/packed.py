"""The packed container: experts as the kernels hold them, in files that are mapped instead of loaded.

A directory with one `manifest.json` and one blob file per layer; docs/packed_format.md has every byte. Opening reads
the manifest and the first 4096 bytes of each blob file, and trusts neither: sizes follow from the shapes, offsets lie
inside the files, and nothing is allocated by a number that a file names.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from kt_sft.errors import FormatError
from kt_sft.formats.packed_manifest import (
    CONVERT_AGAIN,
    HEADER_BYTES,
    PROJECTIONS,
    Manifest,
    PackedLayer,
    parse_manifest,
)
from kt_sft.formats.regular_file import open_regular

MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = "convert-journal.jsonl"  # of a conversion under way
MAGIC = b"KTSPACK1"

_MAX_MANIFEST_BYTES = 256 << 20


def layer_header(identity: str, name: str, file_bytes: int) -> bytes:
    """The first bytes of a layer's file, `HEADER_BYTES` long: it belongs to this layer of this container only."""
    digest = hashlib.sha256(f"{identity}\n{name}".encode("utf-8", "surrogatepass")).digest()
    return (MAGIC + file_bytes.to_bytes(8, "little") + digest).ljust(HEADER_BYTES, b"\0")


def is_container(directory: str | os.PathLike[str]) -> bool:
    """Whether the directory is, or was about to become, a container."""
    return any(os.path.lexists(os.path.join(directory, name)) for name in (MANIFEST_NAME, JOURNAL_NAME))


class PackedContainer:
    """A complete container. Close it, or use it as a context manager; what uses a blob keeps its mapping.

    Args:
        manifest: of the directory, where it has just been read or written.
    Raises:
        FormatError: anything about the directory that is not as docs/packed_format.md says.
    """

    kind = "container"

    def __init__(self, directory: str | os.PathLike[str], manifest: Manifest | None = None):
        self.path = Path(directory)
        self.manifest = read_manifest(self.path) if manifest is None else manifest
        self._marks: dict[str, tuple[int, ...]] = {}  # layer -> its file as its header was read
        self._maps: dict[str, mmap.mmap] = {}
        for layer in self.manifest.layers.values():
            os.close(self._open(layer))

    def blobs(self, name: str, expert: int) -> tuple[memoryview, memoryview, memoryview]:
        """gate, up and down of one expert: read-only views of the mapped file, aligned to 64 bytes.

        Raises:
            FormatError: the file is no longer the one that was opened.
        """
        layer = self.manifest.layers[name]
        if name not in self._maps:
            handle = self._open(layer)
            try:
                self._maps[name] = mmap.mmap(handle, layer.file_bytes, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise FormatError(self.path / layer.file, "mapping", found=str(error), remedy=CONVERT_AGAIN) from None
            finally:
                os.close(handle)
        view = memoryview(self._maps[name])
        gate, up, down = (view[blob.offset : blob.offset + blob.size] for blob in layer.experts[expert])
        return gate, up, down

    def check_blobs(self) -> Iterator[tuple[str, int]]:
        """Compare every checksum with the file; yields (layer, expert) as they turn out right.

        Raises:
            FormatError: names the first matrix that is damaged.
        """
        for name, layer in self.manifest.layers.items():
            for expert, wanted in enumerate(layer.experts):
                for projection, blob, data in zip(PROJECTIONS, wanted, self.blobs(name, expert)):
                    if (found := zlib.crc32(data)) != blob.crc32:
                        raise FormatError(
                            self.path / layer.file,
                            f"{projection} of expert {expert} at byte {blob.offset}",
                            expected=f"CRC-32 {blob.crc32:08x}",
                            found=f"{found:08x}",
                            remedy=f"the file is damaged; {CONVERT_AGAIN}",
                        )
                yield name, expert
            self.close()

    def close(self) -> None:
        """Drop the mappings that nobody uses; the others go with their last user."""
        self._maps.clear()

    def __enter__(self) -> PackedContainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, layer: PackedLayer) -> int:
        """A handle of the layer's file after a look at its length, and at its header unless that was seen."""
        path = self.path / layer.file
        handle = open_regular(path, "blob file", remedy=CONVERT_AGAIN)
        try:
            now = os.fstat(handle)
            size = now.st_size
            if size != layer.file_bytes:
                what = "truncated blob file" if size < layer.file_bytes else "blob file longer than the manifest says"
                raise FormatError(
                    path, what, expected=f"{layer.file_bytes} bytes", found=f"{size} bytes", remedy=CONVERT_AGAIN
                )
            seen = (now.st_dev, now.st_ino, now.st_mtime_ns, now.st_ctime_ns)
            if self._marks.get(layer.name) == seen:
                return handle
            found, wanted = os.pread(handle, HEADER_BYTES, 0), layer_header(self.manifest.identity, layer.name, size)
            if found[: len(MAGIC)] != MAGIC:
                raise FormatError(
                    path, "magic at byte 0", expected=MAGIC.hex(), found=found[: len(MAGIC)].hex(), remedy=CONVERT_AGAIN
                )
            if found != wanted:
                raise FormatError(
                    path,
                    "header",
                    expected=f"that of {layer.name} in this container",
                    found="that of another file",
                    remedy=CONVERT_AGAIN,
                )
            self._marks[layer.name] = seen
        except BaseException:
            os.close(handle)
            raise
        return handle


def read_manifest(directory: Path) -> Manifest:
    """Parse and check manifest.json alone.

    Raises:
        FormatError: missing, damaged, another version or layout, or at odds with itself.
    """
    path = directory / MANIFEST_NAME
    if os.path.lexists(directory / JOURNAL_NAME) and not os.path.lexists(path):
        raise FormatError(
            directory,
            "packed container",
            expected="a finished conversion",
            found="an unfinished one",
            remedy="run the same kt-sft convert command again, which goes on where it stopped",
        )
    handle = open_regular(path, "manifest", remedy=CONVERT_AGAIN)
    with os.fdopen(handle, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > _MAX_MANIFEST_BYTES:
            raise FormatError(path, "manifest", expected=f"at most {_MAX_MANIFEST_BYTES} bytes", found=f"{size} bytes")
        text = stream.read(size)
    return parse_manifest(text, path)
