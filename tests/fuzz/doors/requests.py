"""Doors to the server: bodies of OpenAI's and Ollama's requests, handed to the application without a socket."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kt_sft.errors import KTError
from tests.fuzz.case import Door, Subject
from tests.fuzz.documents import Json
from tests.helpers.fake_chat import FACTS, FakeChat

_TEXT = "The answer is 4."
_CALL = {"function": {"name": "add", "arguments": '{"a": 1}'}}
_TOOL = {"type": "function", "function": {"name": "add", "description": "d", "parameters": {"type": "object"}}}
_MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "content": "4"},
]
_SAMPLING = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x"], "presence_penalty": 0.1}
_OPENAI = {"model": FACTS.name, "max_tokens": 5, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
_OPTIONS = {**_SAMPLING, "top_k": 5, "repeat_penalty": 1.1, "num_predict": 4}
_OLLAMA = {"model": f"{FACTS.name}:latest", "stream": False, "options": _OPTIONS}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**_OPENAI, **_SAMPLING, "messages": _MESSAGES, "tools": [_TOOL], "tool_choice": "auto"},
    "/v1/completions": {**_OPENAI, **_SAMPLING, "prompt": [[1, 2, 3], [65]]},
    "/api/chat": {**_OLLAMA, "messages": _MESSAGES, "tools": [_TOOL]},
    "/api/generate": {**_OLLAMA, "prompt": "hi", "system": "s", "raw": False},
    "/api/show": {"model": FACTS.name},
}
_WORDS = (
    "best_of", "echo", "logprobs", "top_logprobs", "logit_bias", "response_format", "min_p", "ignore_eos", "images",
    "max_completion_tokens", "repetition_penalty", "frequency_penalty", "format", "suffix", "template", "user",
    "function", "user", "assistant", "observation", "developer", "text", "image_url", "none", "required",
    FACTS.base_name, FACTS.name, 16, 17, 64, 65, 128, 255, 256, 2.0, 2.1, [[1]], [[]], "hi", ["hi", "ho"], [1, 2],
    [1, "a"], ["x"] * 16, ["x"] * 17,
)  # fmt: skip


class Refused(KTError):
    """An answer of 4xx."""


@functools.cache
def _application() -> Callable[..., Any]:
    from kt_sft.serving.app import create_app
    from kt_sft.serving.engine import Engine

    return create_app(Engine(FakeChat(_TEXT, facts=dataclasses.replace(FACTS, context_length=1024)), slots=2))


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def _read(route: str, folder: Path) -> bytes:
    """The answer to the body in the folder.

    Raises:
        Refused: with a status of 4xx.
    """
    status, answer = _loop().run_until_complete(_post(route, (folder / "body.json").read_bytes()))
    if 400 <= status < 500:
        values = json.loads(answer)["error"]
        raise Refused(values if isinstance(values, str) else values["message"])
    assert status == 200, f"status {status}: {answer[:200]!r}"
    return answer


async def _post(route: str, body: bytes) -> tuple[int, bytes]:
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": route, "raw_path": route.encode(), "query_string": b"", "root_path": "",
        "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip
    received, sent, silent = iter((body,)), [], asyncio.Event()

    async def receive() -> dict[str, Any]:
        piece = next(received, None)
        if piece is None:
            await silent.wait()  # the client stays
        return {"type": "http.request", "body": piece, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await _application()(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def _check(route: str, answer: bytes) -> None:
    """The answer has the words of the model, as events, lines or one object."""
    text = answer.decode()
    if text.startswith("data: "):
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert events.pop() == "[DONE]"
        values = [json.loads(event) for event in events]
    else:
        values = [json.loads(line) for line in text.strip().split("\n")]
    assert all(isinstance(value, dict) and "error" not in value for value in values), text[:200]
    if route.startswith("/v1/"):
        assert all(value["object"] for value in values)
    elif route != "/api/show":
        assert values[-1]["done"] is True


def _build(route: str, _: Path) -> Subject:
    document = Json(json.dumps(BODIES[route]).encode(), _WORDS)
    return Subject(
        {"body.json": document},
        functools.partial(_read, route),
        lambda folder, answer: _check(route, answer),
        odd=(),
    )


DOORS = tuple(
    Door(f"request{route.replace('/', '-')}", functools.partial(_build, route), loads=True) for route in BODIES
)
