"""The only importer of the compiled extension."""

from __future__ import annotations

from types import ModuleType

from kt_sft import env
from kt_sft.errors import KTError

_module: ModuleType | None = None


class NativeMissing(KTError, ImportError):
    """The compiled kernels cannot be imported."""


def native() -> ModuleType:
    """The extension `kt_sft._native`, imported at the first call.

    Raises:
        NativeMissing: it was not built for this Python, or the file is damaged.
        KeyboardInterrupt: Ctrl-C meanwhile.
    """
    global _module
    if _module is None:
        try:
            from kt_sft import _native
        except ImportError as error:
            # A Ctrl-C while the library starts is wrapped into the error of the import.
            if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise NativeMissing(
                f"the compiled kernels kt_sft._native cannot be imported ({error}); build them for this Python with "
                "`pip install .` in the kt_sft source folder (needs g++ >= 12)"
            ) from error
        if env.openmp_waits():
            _native.leave_openmp_threads()
        _module = _native
    return _module
