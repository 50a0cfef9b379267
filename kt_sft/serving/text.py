"""Token ids to text as they come, ending before a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_SILENT_TOKENS = 8  # a character has at most four bytes; more unreadable tokens than this are no beginning of one


class TextStream:
    """Gives text when it is final.

    Args:
        decode: of the tokenizer; the text of tokens may depend on those before them.
        stop: the text ends before the first of these.
        context: tokens that the text continues; without them a tokenizer may leave out the space at its beginning.

    What may still change is held back: the bytes of an unfinished character, and what could begin a stop string.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = (), *, context: Sequence[int] = ()
    ):
        self._decode = decode
        self._stop = tuple(stop)
        self._ids = list(context)  # tokens before are no longer needed to decode
        self._read = len(self._ids)  # of these, when text came last
        self._given = _final_length(decode(self._ids)) if self._ids else 0  # characters of their text
        self._silent = 0  # tokens since text came last
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that this token completes; `stopped` tells that a stop string was found."""
        self._ids.append(token)
        self._silent += 1
        text = self._decode(self._ids)[self._given :]
        final = text.rstrip(REPLACEMENT)
        if not final and self._silent >= MAX_SILENT_TOKENS:
            final = text
        if not final:
            return ""
        self._give(len(final), len(text))
        return self._until_stop(final)

    def finish(self) -> str:
        """The rest."""
        if self.stopped:
            return ""
        text = self._until_stop(self._decode(self._ids)[self._given :])
        rest, self._held = text + self._held, ""
        return rest

    def _give(self, final: int, known: int) -> None:
        """So many characters of the known ones are given; keep the tokens from the time before on to decode with."""
        self._silent = 0
        recent = self._decode(self._ids[self._read :])
        given = len(recent) if final == known else len(recent.rstrip(REPLACEMENT))
        if given or final == known:
            self._ids, self._read, self._given = self._ids[self._read :], len(self._ids) - self._read, given
        else:  # they begin within a character and hold no whole one
            self._given += final

    def _until_stop(self, text: str) -> str:
        text = self._held + text
        found = [at for at in (text.find(word) for word in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, word) for word in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _final_length(text: str) -> int:
    """Characters before an unfinished one."""
    return len(text.rstrip(REPLACEMENT)) or len(text)


def _overlap(text: str, word: str) -> int:
    """Length of the longest proper beginning of `word` that ends `text`."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)
