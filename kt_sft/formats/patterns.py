"""Regular expressions that a file brings, matched within a time limit: `re` tries one such as `(a|aa)+$` for ever."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import regex

from kt_sft.errors import ConfigError

MOST_LENGTH = 2000
_ORDINARY_S = 5e-6  # of one search in the name of a module


@dataclass
class Allowance:
    """Seconds that all expressions of a file may take together, beside what so many ordinary ones take."""

    seconds: float = 0.5


class Pattern:
    """A regular expression in the syntax of `re`, matched by PyPI's `regex`, which can be interrupted.

    Args:
        pattern: of `re.search`.
        what: names it in messages.
        allowance: shared by those of a file.
    Raises:
        ConfigError: no regular expression.
    """

    def __init__(self, pattern: str, what: str, allowance: Allowance | None = None):
        self.pattern = pattern
        self._what = what
        self._allowance = allowance or Allowance()
        if len(pattern) > MOST_LENGTH:
            raise ConfigError(f"{what}: expected at most {MOST_LENGTH} characters, found {len(pattern)}; shorten it")
        try:
            re.compile(pattern)
            self._compiled = regex.compile(pattern, cache_pattern=False)
        except (re.error, regex.error, OverflowError, RecursionError, MemoryError) as error:
            found = str(error) or "groups inside groups without end"
            raise ConfigError(f"{what} {pattern!r}: expected a regular expression, found {found}") from None

    def search(self, text: str) -> bool:
        """Whether it fits some part of a text.

        Raises:
            ConfigError: the time is over.
        """
        begin = time.perf_counter()
        try:
            return self._compiled.search(text, timeout=max(self._allowance.seconds, 1e-3)) is not None
        except TimeoutError:
            raise ConfigError(
                f"{self._what} {self.pattern!r}: expected a regular expression that takes microseconds, found one that "
                f"tries too many ways to fit {text[:80]!r}; leave out repetitions inside repetitions"
            ) from None
        finally:
            self._allowance.seconds -= time.perf_counter() - begin - _ORDINARY_S
