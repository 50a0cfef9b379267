"""The progress bar: what long work calls (`Bar`), and the one that is shown where no command has its own.

Imports nothing until a bar is made: programs that load experts without transformers show one, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Move(Protocol):
    """Moves a bar to what is done by now."""

    def __call__(self, done: int, total: int, name: str, /) -> None: ...


class Bar(Protocol):
    """Makes a bar for a piece of work that has `total` parts."""

    def __call__(self, what: str, total: int, /) -> AbstractContextManager[Move]: ...


def no_bar(done: int, total: int, name: str) -> None:
    """Shows nothing."""


@contextmanager
def progress_bar(what: str, total: int, *, unit: str, is_shown: bool = True) -> Iterator[Move]:
    """A line of tqdm, which the switches of transformers and huggingface_hub turn off."""
    from huggingface_hub.utils import tqdm

    with tqdm(total=total, desc=what, unit=unit, disable=not is_shown) as bar:

        def move(done: int, _total: int, _name: str) -> None:
            bar.update(done - bar.n)

        yield move
