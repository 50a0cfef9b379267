"""Nobody imports this but code that a damaged file names: `sprung` then says so."""

from __future__ import annotations

sprung = True


def spring(*_: object, **__: object) -> None:
    """Something to call."""
