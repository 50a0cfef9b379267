"""Clients that go, signals, addresses: the server as a process."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from kt_sft.errors import ConfigError
from kt_sft.serving import http
from kt_sft.serving.engine import Engine
from kt_sft.serving.server import Server, bind
from tests.helpers.fake_chat import HI, FakeChat, running, wait_until
from tests.helpers.llamafactory_runs import environment

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = "a" * 100_000
ROUTES = {
    "/v1/chat/completions": {"model": "demo", "messages": HI, "max_tokens": 100},
    "/v1/completions": {"model": "demo", "prompt": "hi", "max_tokens": 100},
    "/api/chat": {"model": "demo", "messages": HI, "options": {"num_predict": 100}},
    "/api/generate": {"model": "demo", "prompt": "hi", "options": {"num_predict": 100}},
}


@pytest.mark.parametrize("route", ROUTES)
def test_client_that_goes_in_mid_stream_frees_its_slot(route):
    chat = FakeChat(ENDLESS)
    with running(chat, slots=1) as (url, engine):
        chat.gate.clear()  # after the first token nothing comes: the server cannot notice by sending
        with httpx.stream("POST", url + route, json={**ROUTES[route], "stream": True}, timeout=60) as response:
            pieces = response.iter_bytes()  # kept: when it goes, httpx closes the connection
            next(pieces)
            wait_until(lambda: engine.counts() == (1, 0))
        wait_until(lambda: engine.counts() == (0, 0))
        chat.gate.set()
        assert httpx.post(url + route, json={**ROUTES[route], "stream": False}, timeout=60).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
def test_client_that_goes_before_its_answer_frees_its_slot(route):
    chat = FakeChat(ENDLESS)
    with running(chat, slots=1) as (url, engine):
        chat.gate.clear()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + route, json={**ROUTES[route], "stream": False}, timeout=0.5)
        wait_until(lambda: engine.counts() == (0, 0))


def test_client_that_goes_while_it_sends_leaves_no_traceback(caplog, monkeypatch):
    with running(FakeChat()) as (url, _):
        monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        assert httpx.get(f"{url}/health").status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_client_that_goes_while_it_waits_is_never_computed():
    chat = FakeChat("ab")
    with running(chat, slots=1) as (url, engine):
        chat.gate.clear()
        body = {"model": "demo", "prompt": "first", "max_tokens": 2}
        first = threading.Thread(target=httpx.post, args=(f"{url}/v1/completions",), kwargs={"json": body})
        first.start()
        wait_until(lambda: engine.counts() == (1, 0))
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json={**body, "prompt": "second"}, timeout=0.3)
        wait_until(lambda: engine.counts() == (1, 0))
        chat.gate.set()
        first.join(60)
    assert chat.prompts == ["first"]


def test_every_stream_of_many_has_its_own_answer():
    chat = FakeChat(lambda prompt, sampling: prompt.removeprefix("user:") * 3)

    async def ask(client: httpx.AsyncClient, word: str) -> str:
        body = {"model": "demo", "messages": [{"role": "user", "content": word}], "stream": True, "max_tokens": 99}
        text = ""
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
        return text

    async def ask_all(url: str) -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            return await asyncio.gather(*(ask(client, f"word {i} ") for i in range(16)))

    with running(chat, slots=4) as (url, _):
        assert asyncio.run(ask_all(url)) == [f"word {i} " * 3 for i in range(16)]
    assert not chat.overlapped


def test_silent_stream_of_ollama_sends_empty_pieces(monkeypatch):
    monkeypatch.setattr(http, "SILENCE_S", 0.05)
    chat = FakeChat("ab")
    with running(chat) as (url, _):
        chat.gate.clear()
        with httpx.stream("POST", f"{url}/api/chat", json=ROUTES["/api/chat"], timeout=60) as response:
            parts = (json.loads(line) for line in response.iter_lines())
            seen = [next(parts), next(parts)]
            chat.gate.set()
            seen += parts
    texts = [part["message"]["content"] for part in seen]
    assert "" in texts[:2] and "".join(texts) == "ab" and [part["done"] for part in seen[-2:]] == [False, True]


def test_silent_stream_says_that_it_is_alive(monkeypatch):
    monkeypatch.setattr(http, "SILENCE_S", 0.05)
    chat = FakeChat("ab")
    with running(chat) as (url, _):
        chat.gate.clear()
        body = {**ROUTES["/v1/chat/completions"], "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            while not next(lines).startswith(":"):
                pass
            chat.gate.set()
            rest = [line for line in lines if line.startswith("data:")]
        assert rest[-1] == "data: [DONE]"


def test_slow_answer_times_out_with_an_error():
    with running(FakeChat(ENDLESS, delay_s=0.01), timeout_s=0.3) as (url, _):
        response = httpx.post(f"{url}/v1/chat/completions", json=ROUTES["/v1/chat/completions"], timeout=60)
        assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
        body = {**ROUTES["/v1/chat/completions"], "stream": True}
        last = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).text.strip().splitlines()[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "timeout_error"


def test_full_queue_is_503_with_retry_after():
    chat = FakeChat("ab")
    with running(chat, slots=1, max_waiting=0) as (url, engine):
        assert httpx.post(f"{url}/v1/completions", json=ROUTES["/v1/completions"]).status_code == 200
        wait_until(lambda: engine.counts() == (0, 0))
        chat.gate.clear()
        with httpx.stream("POST", f"{url}/api/chat", json=ROUTES["/api/chat"]):
            wait_until(lambda: engine.counts() == (1, 0))
            response = httpx.post(f"{url}/v1/completions", json=ROUTES["/v1/completions"])
        assert response.status_code == 503 and response.headers["retry-after"] == "1"


def test_stopping_answers_what_is_running():
    chat = FakeChat(ENDLESS, delay_s=0.01)
    found = []
    with running(chat, slots=1) as (url, engine):

        def ask() -> None:
            found.append(httpx.post(f"{url}/v1/completions", json=ROUTES["/v1/completions"], timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: engine.counts() == (1, 1))
        started = time.monotonic()
    for thread in threads:
        thread.join(60)
    assert time.monotonic() - started < 10
    assert [response.status_code for response in found] == [503, 503]


def test_address_in_use_is_an_error_of_one_sentence():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match="cannot listen there"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="cannot listen there"):
        bind("no such host", 0)


def test_address_that_another_server_took_while_this_one_loaded_is_an_error_of_one_sentence():
    engine = Engine(FakeChat(), slots=1)
    with bind("127.0.0.1", 0) as first, bind("127.0.0.1", first.getsockname()[1]) as second:
        Server(engine, first)
        with pytest.raises(ConfigError, match="cannot listen there any more"):
            Server(engine, second)
    engine.close()


SERVE_FAKE = """
import sys
from kt_sft.serving.engine import Engine
from kt_sft.serving.server import Server, bind
from tests.helpers.fake_chat import FakeChat
sock = bind("127.0.0.1", 0)
print(sock.getsockname()[1], flush=True)
sys.exit(not Server(Engine(FakeChat("a" * 100_000, delay_s=0.005), slots=2), sock).serve_until_stopped())
"""


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM], ids=lambda sig: sig.name)
def test_signal_in_mid_stream_stops_the_process_cleanly(sig):
    with subprocess.Popen(
        [sys.executable, "-c", SERVE_FAKE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(use_kt=False), cwd=ROOT,
    ) as process:  # fmt: skip
        try:
            port = int(process.stdout.readline())
            wait_until(lambda: is_listening(port))
            body = {**ROUTES["/v1/chat/completions"], "stream": True}
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            with httpx.stream("POST", url, json=body, timeout=60) as response:
                lines = response.iter_lines()
                next(lines)
                started = time.monotonic()
                process.send_signal(sig)
                rest = [line for line in lines if line]
            assert "shutting down" in rest[-1]
            _, log = process.communicate(timeout=60)
            assert time.monotonic() - started < 15 and process.returncode == 0, log
            assert "Traceback" not in log
        finally:
            process.kill()


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
