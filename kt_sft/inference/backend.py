"""A chat model, as the server sees one: plain data and one protocol. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

MIN_TEMPERATURE = 1e-5  # below it, scores divided by it are beyond float32; the most likely token is what is meant


class PromptError(ValueError):
    """A conversation that a model's template cannot hold, in one sentence."""


class ToolCall(NamedTuple):
    """A function that the model wants called; `arguments` is JSON."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt. None: as the model's configuration says.

    Args:
        max_tokens: at most so many, at least one.
        temperature: below MIN_TEMPERATURE takes the most likely token.
        seed: equal seeds give equal answers; None draws one.
        ignore_eos: go on to max_tokens (for measurements).
        adapter: with the adapter, if there is one to switch.
    """

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    adapter: bool = True


@dataclass(frozen=True)
class ModelFacts:
    """What is served; everything that the listings of both protocols show.

    Args:
        name: of the model as it is, adapter included.
        base_name: of the same model with the adapter switched off; None if it cannot be.
        context_length: prompt and answer together, in tokens.
        default_max_tokens: of an answer whose request names no limit.
        created: when its files were last changed, seconds since 1970.
        digest: 64 hexadecimal digits that change with the files.
    """

    name: str
    base_name: str | None
    context_length: int
    default_max_tokens: int
    vocab_size: int
    family: str
    num_parameters: int
    weight_format: str
    size_bytes: int
    created: float
    digest: str

    @property
    def names(self) -> list[str]:
        return [self.name, *([self.base_name] if self.base_name else [])]


class ChatBackend(Protocol):
    """A loaded model. `generate` is called from several threads, one at a time between two calls of `pause`."""

    facts: ModelFacts

    def encode_chat(self, messages: list[dict[str, str]], system: str | None, tools: str | None) -> list[int]:
        """Prompt of a conversation.

        Args:
            messages: role (user, assistant, function, observation) and content, user's and model's in alternation.
            tools: JSON list of functions.

        Raises:
            PromptError: the template cannot hold it.
        """
        ...

    def encode_text(self, text: str) -> list[int]:
        """Prompt of plain text, no template."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        ...

    def tool_calls(self, text: str) -> list[ToolCall]:
        """The functions that an answer asks for; empty: it is a text."""
        ...

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        on_token: Callable[[int], bool],
        pause: Callable[[], None],
    ) -> str:
        """Continue a prompt.

        Args:
            on_token: gets each token; True ends the answer.
            pause: called between tokens and between parts of a long prompt. Others may compute meanwhile; it raises
                to end the generation.
        Returns:
            `stop` or `length`.
        """
        ...
