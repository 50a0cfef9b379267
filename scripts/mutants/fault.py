"""One planted fault: a small edit of one file, and the tests that have to see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """A text that is replaced, once, by another.

    Args:
        name: what would be wrong for a user.
        file: below the root of the repository.
        old: occurs exactly once in the file; short, so that edits beside it leave it alone.
        tests: node ids of pytest; one of them has to fail. Few and quick: each fault is a process of its own.
        reason: why it may survive; empty for all that tests must see.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    reason: str = ""

    @property
    def is_native(self) -> bool:
        """Whether the library has to be built again."""
        return self.file.startswith("native/")

    def planted(self, text: str) -> str:
        """The content of the file with the fault.

        Raises:
            ValueError: the old text is not there, or not once: the list is stale.
        """
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file}: expected the text once, found it {count} times: {self.old!r}")
        return text.replace(self.old, self.new)

    def stale(self, root: Path) -> str | None:
        """Why the fault cannot be planted any more."""
        path = root / self.file
        if not path.is_file():
            return f"{self.file}: no such file"
        try:
            self.planted(path.read_text(encoding="utf-8"))
        except ValueError as error:
            return str(error)
        gone = [test for test in self.tests if not _has_test(root, test)]
        return f"no such test: {gone[0]}" if gone else None


def _has_test(root: Path, test: str) -> bool:
    """Whether a file has a function, or class, of the name in a node id."""
    file, _, rest = test.partition("::")
    path = root / file
    if not path.is_file():
        return False
    name = rest.rpartition("::")[2].partition("[")[0]
    return not name or f"def {name}(" in path.read_text(encoding="utf-8")
