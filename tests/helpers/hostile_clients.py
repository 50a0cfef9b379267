"""Clients that wish a server ill, and one that asks a small question meanwhile and notes how long it waits."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psutil

MIB = 1 << 20


@dataclass
class Waits:
    """What a client saw that went on asking: seconds until each answer, and the status of each."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)  # 0: no answer

    def within(self, limit_s: float) -> bool:
        return bool(self.seconds) and max(self.seconds) <= limit_s and not self.statuses[0]


def question(model: str) -> dict[str, object]:
    """A small one, of a chat."""
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def post(port: int, path: str, body: bytes | dict, *, timeout_s: float = 60.0, **headers: str) -> tuple[int, bytes]:
    """(status, body) of one request on a connection of its own; an answer before its end is heard."""
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", path, content, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def raw(port: int, *pieces: bytes, timeout_s: float = 20.0, pause_s: float = 0.0) -> bytes:
    """All that the server says to these bytes until it closes the connection or says nothing for `timeout_s`."""
    said = bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as client, contextlib.suppress(OSError):
        for piece in pieces:
            client.sendall(piece)
            time.sleep(pause_s)
        while chunk := client.recv(65536):
            said += chunk
    return bytes(said)


def statuses(said: bytes) -> list[int]:
    """Of the responses in what a server said."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", said)]


@contextlib.contextmanager
def bystander(port: int, model: str, *, every_s: float = 0.05) -> Iterator[Waits]:
    """A client that asks a small question again and again, each time on a new connection."""
    waits, is_over = Waits(), threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            started, status = time.monotonic(), 0
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, _ = post(port, "/v1/chat/completions", question(model))
            waits.seconds.append(time.monotonic() - started)
            waits.statuses[status] += 1
            is_over.wait(every_s)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield waits
    finally:
        is_over.set()
        thread.join(90)


def together(count: int, attack: Callable[[int], int]) -> Counter[int]:
    """Statuses of `count` attacks at the same time; 0 where there was none."""
    found: Counter[int] = Counter()

    def one(number: int) -> None:
        status = 0
        with contextlib.suppress(OSError, http.client.HTTPException):
            status = attack(number)
        found[status] += 1

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    return found


def long_prompt(port: int, model: str, size: int) -> int:
    """Words of random-looking text."""
    body = question(model) | {
        "messages": [{"role": "user", "content": ("lorem ipsum dolor " * (size // 18 + 1))[:size]}]
    }
    return post(port, "/v1/chat/completions", body)[0]


def many_messages(port: int, model: str, count: int) -> int:
    """User and assistant in alternation."""
    turns = [{"role": "assistant" if i % 2 else "user", "content": "x"} for i in range(count - 1 + count % 2)]
    return post(port, "/v1/chat/completions", question(model) | {"messages": turns})[0]


def many_values(port: int, kind: int) -> int:
    """16 MB of the smallest values that JSON has."""
    value = (b"[]", b"{}", b"0", b'""', b"1.1", b'{"a":0}')[kind % 6]
    body = b'{"model": [' + (value + b",") * (16_000_000 // (len(value) + 1)) + b"0]}"
    return post(port, "/v1/chat/completions", body)[0]


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def slow_headers(port: int, count: int, seconds: float) -> Counter[int]:
    """Connections that send a line of a header now and then and never the last one."""
    return _slowly(port, count, seconds, HEAD, b"X-More: 1\r\n")


def slow_bodies(port: int, count: int, seconds: float) -> Counter[int]:
    """Connections that send a byte of a body now and then."""
    return _slowly(port, count, seconds, HEAD + b"Content-Length: 1000\r\n\r\n", b" ")


def _slowly(port: int, count: int, seconds: float, first: bytes, more: bytes) -> Counter[int]:
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(count):
            with contextlib.suppress(OSError):
                client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
                client.sendall(first)
                clients.append(client)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(0.2)
            for client in clients:
                with contextlib.suppress(OSError):
                    client.sendall(more)
    return Counter()


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


def active(port: int) -> int:
    """Answers that are being written or wait."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/health")
    counts = json.loads(connection.getresponse().read())
    connection.close()
    return counts["active"] + counts["waiting"]


def leave_in_mid_stream(port: int, model: str) -> int:
    """Go after the first bytes of an answer."""
    body = json.dumps(question(model) | {"stream": True, "max_tokens": 400, "ignore_eos": True}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        return int(client.recv(64).split()[1])


def health_ms(port: int, count: int = 200) -> list[float]:
    """Milliseconds of /health on one connection, sorted."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    found = []
    for _ in range(count):
        started = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        found.append((time.perf_counter() - started) * 1e3)
    connection.close()
    return sorted(found)


def resident_mib(pid: int) -> float:
    return psutil.Process(pid).memory_info().rss / MIB
