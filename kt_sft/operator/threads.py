"""The threads of the process's one kernel pool, which all operators share."""

from __future__ import annotations

import gc
import threading
import weakref

from kt_sft.config import KTConfig
from kt_sft.errors import ConfigError
from kt_sft.native import native
from kt_sft.runtime import prepare_native

_lock = threading.Lock()
_users: weakref.WeakSet = weakref.WeakSet()
_asked: tuple[int | None, int | None] = (None, None)


def join_pool(user: object, config: KTConfig) -> None:
    """Start the pool for the first of the operators; the others must ask for the same, or for nothing.

    Args:
        user: the operator; when all are gone, the next one may choose anew.
        config: its threads and groups of threads; None: what is there, or the default.
    Raises:
        ConfigError: other numbers than those of the operators that are alive.
        UnsupportedHardware: the CPU lacks AVX2.
    """
    global _asked
    threads, pools = config.threads, config.threadpool_count
    with _lock:
        if _faults(threads, pools):
            gc.collect()  # an operator in a reference cycle, as exceptions make them, is alive for nobody
        if not _users:
            prepare_native(config)
            _asked = (threads, pools)
        elif faults := _faults(threads, pools):
            raise ConfigError(faults)
        _users.add(user)


def _faults(threads: int | None, pools: int | None) -> list[str]:
    if not _users:
        return []
    running = native().num_threads(), native().num_pools()
    names = ("cpuinfer_threads", "threadpool_count")
    held = tuple(own if own is not None else now for own, now in zip(_asked, running, strict=True))
    return [
        f"{name}: {wanted} is asked for, but the operators of this process run with {has}; a process has one pool of "
        f"kernel threads: give all operators the same number, or leave {name} out"
        for name, wanted, has in zip(names, (threads, pools), held, strict=True)
        if wanted is not None and wanted != has
    ]
