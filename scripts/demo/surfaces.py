"""One model's answers through what users talk to: `chat`, `api` with concurrent streams, `kt-sft serve` with Ollama."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

STREAMS = 4  # requests in flight at a time
_START_SECONDS, _STOP_SECONDS = 300, 30
_BIN = Path(sys.executable).parent


class SurfaceError(RuntimeError):
    """A command that did not start, or ended; the message says which and where its output is."""


def chat(config: Path, questions: list[str]) -> list[str]:
    """`llamafactory-cli chat`, as typed: each question in a conversation of its own."""
    typed = "".join(f"{question}\nclear\n" for question in questions) + "exit\n"
    command = [str(_BIN / "llamafactory-cli"), "chat", str(config)]
    done = subprocess.run(command, env=_environment(), input=typed, capture_output=True, text=True)
    answers = re.findall(r"Assistant: (.*?)\n\nUser: ", done.stdout, flags=re.DOTALL)
    if done.returncode or len(answers) != len(questions):
        raise SurfaceError(
            f"{' '.join(command)}: {len(answers)} answers, exit {done.returncode}\n{done.stderr[-2000:]}"
        )
    return answers


def api(config: Path, questions: list[str]) -> list[str]:
    """`llamafactory-cli api`, asked by the openai package in concurrent streams."""
    port = _free_port()
    environment = _environment() | {"API_HOST": "127.0.0.1", "API_PORT": str(port)}
    with _server(
        [str(_BIN / "llamafactory-cli"), "api", str(config)], f"http://127.0.0.1:{port}/v1/models", environment
    ):
        return asyncio.run(_streamed(f"http://127.0.0.1:{port}/v1", questions))


def ollama(config: Path, questions: list[str]) -> list[str]:
    """`kt-sft serve`, asked by the ollama package."""
    from ollama import Client

    port = _free_port()
    host = f"http://127.0.0.1:{port}"
    with _server([str(_BIN / "kt-sft"), "serve", str(config), "--port", str(port)], f"{host}/api/tags", _environment()):
        client = Client(host=host)
        model = client.list().models[0].model
        return [_content(client.chat(model, [{"role": "user", "content": text}])) for text in questions]


def _content(response) -> str:
    return response.message.content


async def _streamed(url: str, questions: list[str]) -> list[str]:
    from openai import AsyncOpenAI

    slots = asyncio.Semaphore(STREAMS)
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:

        async def ask(text: str) -> str:
            messages = [{"role": "user", "content": text}]
            async with slots:
                stream = await client.chat.completions.create(model="demo", messages=messages, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

        return await asyncio.gather(*map(ask, questions))


@contextlib.contextmanager
def _server(command: list[str], url: str, environment: dict[str, str]) -> Iterator[None]:
    """A server that answers at `url`; ended as Ctrl-C ends it."""
    log = Path(command[2]).with_suffix(f".{command[1]}.log")
    with log.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT)
    try:
        limit = time.monotonic() + _START_SECONDS
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > limit:
                raise SurfaceError(f"{' '.join(command)}: does not answer; see {log}")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment() -> dict[str, str]:
    return {**os.environ, "USE_KT": "1"}
