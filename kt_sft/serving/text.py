"""Token ids to text as they come, ending before a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_PENDING_TOKENS = 8  # a character has at most four bytes; more unreadable tokens than this are no beginning of one


class TextStream:
    """Gives text when it is final.

    Args:
        decode: of the tokenizer; the text of tokens may depend on those before them.
        stop: the text ends before the first of these.

    What may still change is held back: the bytes of an unfinished character, and what could begin a stop string.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._context = 0  # tokens before are no longer needed to decode
        self._read = 0  # tokens before have become text
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that this token completes; `stopped` tells that a stop string was found."""
        self._ids.append(token)
        text = self._new_text()
        pending = len(self._ids) - self._read
        if not text or (text.endswith(REPLACEMENT) and pending < MAX_PENDING_TOKENS):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return self._until_stop(text)

    def finish(self) -> str:
        """The rest."""
        if self.stopped:
            return ""
        text = self._until_stop(self._new_text())
        rest, self._held = text + self._held, ""
        return rest

    def _new_text(self) -> str:
        known = self._decode(self._ids[self._context : self._read])
        return self._decode(self._ids[self._context :])[len(known) :]

    def _until_stop(self, text: str) -> str:
        text = self._held + text
        found = [at for at in (text.find(word) for word in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, word) for word in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, word: str) -> int:
    """Length of the longest proper beginning of `word` that ends `text`."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)
