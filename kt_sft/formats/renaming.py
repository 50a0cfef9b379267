"""Renames that Python does not offer: exchanging two names in one step, and never over something that is there."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_HERE = -100  # AT_FDCWD
_NO_REPLACE, _EXCHANGE = 1, 2
# Of a kernel, a C library or a file system (NFS, some FUSE ones) without them.
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY)


def exchange(one: Path, other: Path) -> bool:
    """Exchange what two names mean in one step; False: the file system cannot.

    Raises:
        OSError: another fault.
    """
    return _rename(one, other, _EXCHANGE)


def rename_new(source: Path, target: Path) -> None:
    """Rename to a name that is free.

    Raises:
        FileExistsError: it is taken.
        OSError: another fault.
    """
    if not _rename(source, target, _NO_REPLACE):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.rename(source, target)


def _rename(source: Path, target: Path, flags: int) -> bool:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if call(_HERE, os.fsencode(source), _HERE, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
