"""An asynchronous client that measures an OpenAI-compatible server: prompts of a given length, several at a time."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from kt_sft.errors import ConfigError, KTError

# Common words, most of them one token in most vocabularies; a probe finds out how many tokens they really are.
WORDS = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work number night point home water "
    "room mother area money story fact month lot right study book eye job word business issue side kind head "
    "house service friend father power "
)
MIN_PROBE_WORDS = 32


class ServerUnusable(KTError):
    """The server to measure cannot be reached, or refuses what a measurement needs."""


@dataclass(frozen=True)
class Settings:
    """What is asked of the server.

    Args:
        url: of the API, with or without `/v1`.
        prompt_tokens: length of each prompt; reached within a few tokens where the server says how long one was.
        num_requests: in all, `concurrent` of them at a time.
        ignores_eos: ask the server to go on to max_tokens (kt_sft, vLLM, SGLang know it).
        timeout_s: for one request.
    """

    url: str
    model: str
    prompt_tokens: int = 1024
    max_tokens: int = 512
    concurrent: int = 1
    num_requests: int = 1
    ignores_eos: bool = False
    api_key: str | None = None
    timeout_s: float = 3600.0
    seed: int = 0

    @property
    def endpoint(self) -> str:
        base = self.url.rstrip("/")
        for end in ("/chat/completions", "/v1"):
            base = base.removesuffix(end)
        return f"{base}/v1/chat/completions"


@dataclass
class Record:
    """One request. Seconds count from the start of the measurement.

    Args:
        arrivals: of the pieces of text.
        finished: when the finish_reason came.
        prompt_tokens, completion_tokens: as the server says, or estimated.
        counted_by: `usage` where the server said it; `chunks`: pieces of text were counted, several tokens may be one.
    """

    sent: float
    arrivals: list[float] = field(default_factory=list)
    finished: float | None = None
    ended: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    counted_by: str = "chunks"
    finish_reason: str | None = None
    error: str | None = None

    @property
    def first_token_s(self) -> float | None:
        """From sending to the first text."""
        return self.arrivals[0] - self.sent if self.arrivals else None

    @property
    def last_token_at(self) -> float | None:
        """The end-of-answer token, which usage counts, has no text: it comes with the finish_reason."""
        if self.counted_by == "usage" and self.finish_reason == "stop" and self.finished is not None:
            return self.finished
        return self.arrivals[-1] if self.arrivals else None

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens per second up to the first token, time in the server's queue included."""
        seconds = self.first_token_s
        return self.prompt_tokens / seconds if seconds and self.prompt_tokens else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first."""
        seconds = self.last_token_at - self.arrivals[0] if self.arrivals else 0.0
        return (self.completion_tokens - 1) / seconds if seconds > 0 and self.completion_tokens > 1 else None

    @property
    def token_gap_s(self) -> float | None:
        """Mean time between two tokens; right also where a piece carries several."""
        return 1 / self.decode_rate if self.decode_rate else None

    @property
    def piece_gaps_s(self) -> list[float]:
        """Times between pieces as a reader sees them."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:])]


class Bench:
    """Measures one server; see `run`.

    Args:
        transport: of httpx, for a server in this process.
    """

    def __init__(self, settings: Settings, *, transport: httpx.AsyncBaseTransport | None = None):
        self.settings = settings
        self._transport = transport
        self._random = random.Random(settings.seed)
        self._words_per_token = 1.0
        self._overhead_tokens = 0
        self._sends_stream_options = True
        self._origin = 0.0

    async def run(self, progress: Callable[[Record], None] = lambda record: None) -> list[Record]:
        """Probe the server, then send the requests; a request that fails is a record with an error.

        Args:
            progress: called as each request ends.

        Raises:
            ServerUnusable: not even the probe was answered.
            ConfigError: the address is none.
        """
        settings = self.settings
        key = (settings.api_key or "").encode("utf-8", "surrogateescape")
        headers = {b"Authorization": b"Bearer " + key} if key else {}
        limits = httpx.Limits(max_connections=settings.concurrent)
        async with httpx.AsyncClient(
            headers=headers, timeout=settings.timeout_s, limits=limits, transport=self._transport
        ) as client:
            await self._probe(client)
            self._origin = time.perf_counter()
            waiting = iter(range(settings.num_requests))

            async def work() -> list[Record]:
                records = []
                for _ in waiting:
                    records.append(
                        await self._measure(client, self._prompt(settings.prompt_tokens), settings.max_tokens)
                    )
                    progress(records[-1])
                return records

            workers = await asyncio.gather(*(work() for _ in range(min(settings.concurrent, settings.num_requests))))
        return sorted((record for records in workers for record in records), key=lambda record: record.sent)

    async def _probe(self, client: httpx.AsyncClient) -> None:
        """Two short requests: what a word and the chat template cost in tokens, and whether usage can be had."""
        sizes = (MIN_PROBE_WORDS, 2 * MIN_PROBE_WORDS)
        found = [await self._measure(client, self._text(words), 1) for words in sizes]
        if found[0].error and self._sends_stream_options:  # some servers refuse the field
            self._sends_stream_options = False
            found = [await self._measure(client, self._text(words), 1) for words in sizes]
        if error := next((record.error for record in found if record.error), None):
            raise ServerUnusable(f"{self.settings.endpoint}: {error}")
        small, large = (record.prompt_tokens for record in found)
        if all(record.counted_by == "usage" for record in found) and large > small:
            self._words_per_token = (sizes[1] - sizes[0]) / (large - small)
            self._overhead_tokens = max(0, round(small - sizes[0] / self._words_per_token))

    def _prompt(self, tokens: int) -> str:
        """Text of about so many tokens with the template, different every time, so that no cache has its beginning."""
        return self._text(max(1, round((tokens - self._overhead_tokens) * self._words_per_token)))

    def _text(self, num_words: int) -> str:
        return " ".join(self._random.choices(WORDS.split(), k=num_words))

    async def _measure(self, client: httpx.AsyncClient, prompt: str, max_tokens: int) -> Record:
        body: dict[str, Any] = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        if self._sends_stream_options:
            body["stream_options"] = {"include_usage": True}
        if self.settings.ignores_eos:
            body["ignore_eos"] = True
        record = Record(sent=self._now())
        record.prompt_tokens = self._overhead_tokens + round((prompt.count(" ") + 1) / self._words_per_token)
        try:
            async with client.stream("POST", self.settings.endpoint, json=body) as response:
                if response.status_code != 200:
                    content = (await response.aread()).decode("utf-8", "replace")
                    record.error = f"HTTP {response.status_code}: {_message(content)}"
                    return record
                async for event in _events(response):
                    self._note(record, event)
        except httpx.InvalidURL as error:
            raise ConfigError(f"--api-url: expected http://HOST:PORT, found {self.settings.url!r} ({error})") from None
        except (httpx.HTTPError, OSError, ValueError) as error:
            record.error = f"{type(error).__name__}: {error}".rstrip(": ")
        else:
            if record.error is None and record.finish_reason is None:
                record.error = "the stream ended without a finish_reason"
        record.ended = self._now()
        return record

    def _note(self, record: Record, event: dict[str, Any]) -> None:
        """Take one event of the stream into the record."""
        now = self._now()
        if "error" in event:
            record.error = _message(json.dumps(event))
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or {}
            if any(delta.get(key) for key in ("content", "reasoning_content", "reasoning", "tool_calls")):
                record.arrivals.append(now)
                if record.counted_by == "chunks":
                    record.completion_tokens += 1
            if reason := choice.get("finish_reason"):
                record.finish_reason, record.finished = reason, now
        if usage := event.get("usage"):
            record.prompt_tokens = usage.get("prompt_tokens") or record.prompt_tokens
            if usage.get("completion_tokens") is not None:
                record.completion_tokens, record.counted_by = usage["completion_tokens"], "usage"

    def _now(self) -> float:
        return time.perf_counter() - self._origin


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    async for line in _lines(response):
        if line.startswith(b"data:") and (text := line[len(b"data:") :].strip()) and text != b"[DONE]":
            event = json.loads(text)
            if isinstance(event, dict):
                yield event


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """httpx's own would also end them at U+2028 and the like, which JSON may hold."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
    yield rest


def _message(content: str) -> str:
    """The sentence of an error body."""
    try:
        error = json.loads(content)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return content[:200] or "no body"
