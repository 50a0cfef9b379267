"""From the fields of a request to `Sampling`: what both protocols share."""

from __future__ import annotations

from collections.abc import Sequence

from kt_sft.inference.backend import ModelFacts
from kt_sft.serving.errors import RequestError, unknown_model

MAX_STOPS = 16
MAX_STOP_CHARS = 1024  # of each; every token looks for them in all text that is held back


def uses_adapter(facts: ModelFacts, name: str) -> bool:
    """Whether the model of this name is the one with its adapter.

    Raises:
        RequestError: neither is of this name.
    """
    if name not in facts.names:
        raise unknown_model(name, facts.names)
    return name == facts.name


def stop_strings(value: str | list[str] | None) -> tuple[str, ...]:
    """One, several or none."""
    words = [value] if isinstance(value, str) else value or []
    if len(words) > MAX_STOPS or not all(0 < len(word) <= MAX_STOP_CHARS for word in words):
        expected = f"up to {MAX_STOPS} strings of up to {MAX_STOP_CHARS} characters, none of them empty"
        raise RequestError(400, f"stop: expected {expected}", param="stop")
    return tuple(words)


def top_k(value: int | None) -> int | None:
    """As `Sampling` has it, 0 for all tokens; other servers also write -1."""
    return None if value is None else max(0, value)


def room_for_answer(facts: ModelFacts, prompt_ids: Sequence[int], max_tokens: int | None, *, cuts: bool) -> int:
    """Tokens that the answer may have.

    Args:
        max_tokens: asked for; None takes the server's default, or what fits.
        cuts: take what fits instead of refusing.

    Raises:
        RequestError: no room; the message names the limit.
    """
    limit, used = facts.context_length, len(prompt_ids)
    room = limit - used
    if room < 1 or (max_tokens is not None and max_tokens > room and not cuts):
        asked = f" and {max_tokens} for the answer" if max_tokens is not None and room >= 1 else ""
        raise over_context(limit, f"{used} in the prompt{asked}", "messages")
    return min(room, facts.default_max_tokens if max_tokens is None else max_tokens)


def over_context(limit: int, found: str, param: str) -> RequestError:
    """For a prompt that does not fit.

    Args:
        limit: tokens of the context.
        found: what the request has.
    """
    message = f"this model's context length is {limit} tokens, and the request has {found}; shorten it"
    return RequestError(400, message, param=param, code="context_length_exceeded")
