"""What the commands share on the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from kt_sft import env
from kt_sft.errors import KTError, one_line
from kt_sft.progress import Move


def path(text: str) -> Path:
    """A path of the command line: an empty one, of a variable that is not set, would be the current directory."""
    if not text.strip():
        raise typer.BadParameter("expected a path, found an empty string")
    return Path(text)


def seconds(value: float) -> float:
    """A number of seconds of the command line; `nan` and `inf` are numbers, but no limits."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"expected a number of seconds, found {value}")
    return value


@contextmanager
def errors_in_one_line(command: str) -> Iterator[None]:
    """Show our own errors, and those of files, as one line and leave with status 2, after Ctrl-C with 130.

    KT_SFT_TRACEBACK=1 shows all.
    """
    try:
        yield
    except (KTError, OSError) as error:
        if env.traceback():
            raise
        found = str(error) if isinstance(error, KTError) else one_line(error)
        Console(stderr=True).print(f"kt-sft {command}: error: {escape(found)}", soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@contextmanager
def progress_bar(console: Console, what: str, total: int) -> Iterator[Move]:
    """A bar over experts or tensors on the terminal of a command; with a console it is a `Bar`."""
    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        "left",
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)

        def move(done: int, _total: int, layer: str) -> None:
            progress.update(task, completed=done, description=f"{what} {escape(layer)}")

        yield move
