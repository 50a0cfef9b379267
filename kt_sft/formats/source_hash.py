"""Digests of weight files that cost seconds for a checkpoint of any size: they tell an edited one, not a forged one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from kt_sft.errors import FormatError
from kt_sft.formats.packed_manifest import SOURCE_HASH, SourceFile

ENDS_HASH = "sha256 of size, first MiB and last MiB"  # of containers that earlier releases wrote
_WHOLE_BYTES = 16 << 20
_END_BYTES = 1 << 20
_BLOCKS, _BLOCK_BYTES = 64, 16 << 10  # a disk with a moving head looks for 64 places in half a second


def hash_source(path: Path, how: str = SOURCE_HASH) -> SourceFile:
    """Name, size and digest of a file.

    Args:
        how: `SOURCE_HASH` or `ENDS_HASH`.
    Raises:
        FormatError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            digest = hashlib.sha256(size.to_bytes(8, "little"))
            for begin, count in _parts(size, how):
                stream.seek(begin)
                digest.update(stream.read(count))
    except OSError as error:
        raise FormatError(path, "weights", expected="a readable file", found=error.strerror) from None
    return SourceFile(path.name, size, digest.hexdigest())


def is_complete(size: int, how: str) -> bool:
    """Whether the digest of a file of that size is of all its bytes."""
    return size <= (2 * _END_BYTES if how == ENDS_HASH else _WHOLE_BYTES)


def is_known(how: str) -> bool:
    """Whether files can be compared with digests that were made so."""
    return how in (SOURCE_HASH, ENDS_HASH)


def _parts(size: int, how: str) -> Iterator[tuple[int, int]]:
    """Begin and length of what is read, in order."""
    if how == SOURCE_HASH and size <= _WHOLE_BYTES:
        yield 0, size
        return
    yield 0, _END_BYTES
    if how == SOURCE_HASH:
        between = size - 2 * _END_BYTES - _BLOCK_BYTES
        for block in range(_BLOCKS):
            yield _END_BYTES + between * block // (_BLOCKS - 1), _BLOCK_BYTES
    yield max(min(size, _END_BYTES), size - _END_BYTES), _END_BYTES
