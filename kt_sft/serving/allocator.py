"""Memory that large requests needed goes back to the system. glibc; elsewhere nothing happens."""

from __future__ import annotations

import ctypes

M_ARENA_MAX = -8  # of malloc.h


def use_one_arena() -> None:
    """Let all threads allocate from one heap; call it before there are any.

    Each thread would have a heap of its own, whose end is never given back by `malloc_trim`: tens of MiB for every
    thread that ever saw a large request.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(M_ARENA_MAX, 1)


def give_back() -> None:
    """Return unused pages of the heap."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
