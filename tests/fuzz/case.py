"""One damaged set of files, made of a seed, the name of a door and a number alone."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from tests.fuzz.documents import Document

_ODD_SHARE = 0.03


class Odd(Enum):
    """Something else than a file of bytes."""

    MISSING = "missing"
    DIRECTORY = "a directory"
    PIPE = "a pipe that nobody writes to"
    LOOP = "a link to itself"
    DEVICE = "a link to /dev/zero"


# Of files that a user names himself: he may well name a pipe, and then waits for it.
NAMED = (Odd.MISSING, Odd.DIRECTORY, Odd.LOOP)


@dataclass(frozen=True)
class Subject:
    """What is attacked at a door.

    Args:
        files: damaged ones by name.
        read: all of it, as a user's program would; its result is for `check`.
        check: raises AssertionError where a result is not the right one for what is in the folder.
        fixed: files beside them that stay as they are.
        odd: what may be in the place of a file.
    """

    files: Mapping[str, Document]
    read: Callable[[Path], Any]
    check: Callable[[Path, Any], None] = lambda folder, result: None
    fixed: Mapping[str, bytes] = field(default_factory=dict)
    odd: tuple[Odd, ...] = tuple(Odd)


@dataclass(frozen=True)
class Door:
    """A way into the product.

    Args:
        build: makes the subject; may use the folder for what it needs.
        loads: takes milliseconds rather than fractions of one.
    """

    name: str
    build: Callable[[Path], Subject]
    loads: bool = False


@dataclass(frozen=True)
class Case:
    """`kept`: the numbers of the edits that are made; None: all."""

    seed: int
    door: str
    number: int
    kept: tuple[int, ...] | None = None

    @property
    def command(self) -> str:
        """What makes and reads it again."""
        kept = f" --edits {','.join(map(str, self.kept))}" if self.kept is not None else ""
        return f"python -m tests.fuzz --seed {self.seed} --door {self.door} --case {self.number}{kept}"

    def edits(self) -> int:
        """How many there are."""
        return random.Random(f"{self.seed}/{self.door}/{self.number}").choice((1, 1, 1, 1, 2, 2, 3, 4))

    def damage(self, subject: Subject) -> dict[str, bytes | Odd]:
        """New contents of the files that are damaged."""
        names = sorted(subject.files)
        by_file: dict[str, list[random.Random]] = {}
        odd: dict[str, bytes | Odd] = {}
        for index in range(self.edits()):
            if self.kept is not None and index not in self.kept:
                continue
            rng = random.Random(f"{self.seed}/{self.door}/{self.number}/{index}")
            name = rng.choice(names)
            if subject.odd and rng.random() < _ODD_SHARE:
                other = subject.files[rng.choice(names)].good
                odd[name] = rng.choice((*subject.odd, b"", other, other))
            else:
                by_file.setdefault(name, []).append(rng)
        return {name: subject.files[name].edited(edits) for name, edits in by_file.items()} | odd


def write_good(subject: Subject, folder: Path) -> None:
    """All files as they should be."""
    for name, content in {**subject.fixed, **{name: doc.good for name, doc in subject.files.items()}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        put(folder / name, content)


@contextmanager
def damaged(case: Case, subject: Subject, folder: Path) -> Iterator[int]:
    """The folder with the damage, whose files are good before and after; gives the bytes of all files."""
    changes = case.damage(subject)
    for name, content in changes.items():
        put(folder / name, content)
    try:
        others = sum(len(doc.good) for name, doc in subject.files.items() if name not in changes)
        fixed = sum(map(len, subject.fixed.values()))
        yield others + fixed + sum(len(content) for content in changes.values() if isinstance(content, bytes))
    finally:
        for name in changes:
            put(folder / name, subject.files[name].good)


def put(path: Path, content: bytes | Odd) -> None:
    """A new file: what is mapped of an old one stays."""
    text = os.fspath(path)
    try:
        os.unlink(text)
    except FileNotFoundError:
        pass
    except (IsADirectoryError, PermissionError):
        shutil.rmtree(text)
    if content is Odd.DIRECTORY:
        os.mkdir(text)
    elif content is Odd.PIPE:
        os.mkfifo(text)
    elif content is Odd.LOOP:
        os.symlink(text, text)
    elif content is Odd.DEVICE:
        os.symlink("/dev/zero", text)
    elif isinstance(content, bytes):
        with open(text, "wb") as stream:
            stream.write(content)
