"""transformers' progress bar, moved to where the work is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from transformers.utils import logging as hf_logging

# what, total -> context that gives the function to call: (done, total, name)
Bar = Callable[[str, int], AbstractContextManager[Callable[[int, int, str], None]]]


@contextmanager
def progress_bar(
    what: str, total: int, *, unit: str, is_shown: bool = True
) -> Iterator[Callable[[int, int, str], None]]:
    """Gives the function that moves the bar: (done, total, name)."""
    reached = 0
    with hf_logging.tqdm(total=total, desc=what, unit=unit, disable=not is_shown) as bar:

        def move(done: int, _total: int, _name: str) -> None:
            # A bar that is switched off is an object of another class, which does not count.
            nonlocal reached
            bar.update(done - reached)
            reached = done

        yield move
