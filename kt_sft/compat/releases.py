"""Which release of a library is installed, without importing it; nothing but the standard library."""

from __future__ import annotations

import importlib.metadata


def release_of(distribution: str) -> str | None:
    """The version of a distribution; None: it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
