"""Connections of clients that are slow, wrong or gone."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from kt_sft.serving import connection, limits
from kt_sft.serving.engine import Engine
from kt_sft.serving.server import Server, bind
from tests.helpers.fake_chat import FakeChat, running, wait_until
from tests.helpers.hostile_clients import health_ms, post, raw, statuses

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = {"model": "demo", "prompt": "hi", "max_tokens": 2}
ENDLESS = "a" * 100_000


def request(body: dict = BODY, head: bytes = HEAD) -> bytes:
    content = json.dumps(body).encode()
    return head + b"Content-Length: %d\r\n\r\n" % len(content) + content


@pytest.fixture(autouse=True)
def no_traceback(caplog, monkeypatch):
    for name in ("uvicorn", "asyncio"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.exc_info] == []


@pytest.fixture(scope="module")
def port(url):
    return int(url.rsplit(":", 1)[1])


@contextlib.contextmanager
def served(chat: FakeChat | None = None, **limits_of_engine):
    with running(chat or FakeChat(), **limits_of_engine) as (url, engine):
        yield int(url.rsplit(":", 1)[1]), engine


def connect(port: int, *pieces: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    for piece in pieces:
        client.sendall(piece)
    return client


def is_closed(client: socket.socket, seconds: float) -> bool:
    client.settimeout(seconds)
    try:
        while client.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def test_answers_are_not_held_back(port):
    """Nagle's algorithm and delayed acknowledgements add 40 ms to each answer on a connection that stays."""
    with bind("127.0.0.1", 0) as sock:
        assert sock.proto == socket.IPPROTO_TCP  # what asyncio asks for before it sets TCP_NODELAY
    health_ms(port, 20)
    assert min(health_ms(port, 30)[15] for _ in range(5)) < 20


@pytest.mark.parametrize("sent", [b"", b"GET", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n", HEALTH + b"G"])
def test_header_that_does_not_end_is_not_waited_for(monkeypatch, sent):
    monkeypatch.setitem(connection.LIMITS_S, "header", 0.5)
    with served() as (port, _), connect(port) as client:
        started = time.monotonic()
        client.sendall(sent)
        said = b""
        with contextlib.suppress(OSError):
            while chunk := client.recv(65536):
                said += chunk
                if sent and not sent.startswith(HEALTH):
                    continue
        assert time.monotonic() - started < 15
        assert statuses(said) == ([200, 408] if sent.startswith(HEALTH) else [408] if sent else [])


def test_trickled_header_has_the_same_time(monkeypatch):
    monkeypatch.setitem(connection.LIMITS_S, "header", 1.0)
    with served() as (port, _), connect(port, b"GET /health HTTP/1.1\r\n") as client:
        deadline = time.monotonic() + 20
        with pytest.raises(OSError):
            while time.monotonic() < deadline:
                client.sendall(b"X: 1\r\n")
                time.sleep(0.05)


def test_body_that_was_answered_is_not_waited_for(monkeypatch):
    monkeypatch.setitem(connection.LIMITS_S, "drain", 0.5)
    wrong = HEAD.replace(b"/v1/completions", b"/nothing") + b"Content-Length: 1000\r\n\r\n{"
    with served() as (port, _), connect(port, wrong) as client:
        assert b"404" in client.recv(65536)
        assert is_closed(client, 15)


def test_client_that_does_not_read_is_cut_off(monkeypatch):
    monkeypatch.setitem(connection.LIMITS_S, "write", 0.5)
    with served(FakeChat("x" * 1000)) as (port, engine):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        models = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with client, contextlib.suppress(OSError):
            client.settimeout(1)
            until = time.monotonic() + 20
            while time.monotonic() < until:  # answers to all of these, never read
                client.sendall(models * 100)
            pytest.fail("the server went on writing")
        assert post(port, "/v1/completions", BODY)[0] == 200


def test_new_clients_find_room_where_idle_ones_hold_every_place(monkeypatch):
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 20)
    with served(FakeChat(ENDLESS, delay_s=0.01), slots=2) as (port, engine), contextlib.ExitStack() as stack:
        streaming = stack.enter_context(connect(port, request(BODY | {"stream": True, "max_tokens": 100})))
        wait_until(lambda: engine.counts()[0] == 1)
        halves = [HEAD, b"", HEALTH, HEAD + b"Content-Length: 100\r\n\r\n{"]
        clients = [stack.enter_context(connect(port, halves[i % 4])) for i in range(60)]
        for _ in range(5):
            assert post(port, "/v1/completions", BODY)[0] == 200
        assert is_closed(clients[0], 5) and statuses(streaming.recv(65536)) == [200]


def test_longest_wait_goes_first_and_never_who_waits_for_us():
    def client(kind: str | None, since: float) -> SimpleNamespace:
        state = SimpleNamespace(aborted=False)
        transport = SimpleNamespace(is_closing=lambda: state.aborted, abort=lambda: setattr(state, "aborted", True))
        return SimpleNamespace(
            transport=transport, waits_for=lambda: kind, waiting_since=lambda now: since, is_gone=lambda: state.aborted
        )

    clients = [client(None, 0), client("body", 1), client("header", 3), client("write", 2), client("header", 4)]
    clients.append(client("header", time.monotonic()))  # its header is under way
    order = []
    for _ in range(6):
        connection.make_room(clients)
        order += [clients.index(one) for one in clients if one.is_gone() and clients.index(one) not in order]
    assert order == [3, 2, 4, 1, 5]


def test_requests_that_come_early_are_answered_in_order(port):
    said = raw(port, HEALTH * 3 + request() + HEALTH, quiet_s=1.0)
    assert statuses(said) == [200] * 5 and said.count(b'"status":"ok"') == 4
    second = request()
    said = raw(port, HEALTH + request(), second[:50], second[50:] + HEALTH, quiet_s=1.0, pause_s=0.05)
    assert statuses(said) == [200] * 4


@pytest.mark.parametrize("early", [HEALTH, b"G", b"\x00" * 1000, HEAD + b"Content-Length: 5\r\n\r\n{"])
def test_client_that_goes_after_an_early_request_frees_its_slot(early):
    chat = FakeChat(ENDLESS)
    with served(chat, slots=1) as (port, engine):
        for sends in ((request() + early,), (request(), early)):
            chat.gate.clear()
            with connect(port, sends[0]) as client:
                wait_until(lambda: engine.counts() == (1, 0))
                for more in sends[1:]:
                    client.sendall(more)
                time.sleep(0.1)
            wait_until(lambda: engine.counts() == (0, 0), 20)
            chat.gate.set()


def test_early_requests_are_bounded():
    chat = FakeChat(ENDLESS)
    with served(chat, slots=1) as (port, engine):
        chat.gate.clear()
        with connect(port, request()) as client:
            wait_until(lambda: engine.counts() == (1, 0))
            with contextlib.suppress(OSError):
                client.sendall(HEALTH * 10_000)
            assert is_closed(client, 20)
        wait_until(lambda: engine.counts() == (0, 0))


JSON_BODY = json.dumps(BODY).encode()
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(JSON_BODY), JSON_BODY)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (HEAD + CHUNKED, [200]),
        (HEAD + b"Content-Length: 5\r\n" + CHUNKED, [400]),
        (HEAD.replace(b"1.1", b"1.0") + CHUNKED, [400]),
        (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", [400, 501]),
        (HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", [400, 501]),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", [400]),
        (HEAD + b"Content-Length: 5, 6\r\n\r\nabcdef", [400]),
        (HEAD + b"Content-Length: -1\r\n\r\n", [400]),
        (HEAD + b"Content-Length: +5\r\n\r\nabcde", [400]),
        (HEAD + b"Content-Length: 0x5\r\n\r\nabcde", [400]),
        (HEAD + b"Content-Length: " + b"9" * 20 + b"\r\n\r\n{", [413]),
        (HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{", [400]),
        (HEAD + b"Content-Length: 17000000\r\n\r\n{", [413]),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", [400]),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", [400]),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffffffff\r\n", [400]),
        (HEAD + b"Host: localhost\r\n\r\n", [400]),
        (b"GET /health HTTP/1.1\r\n\r\n", [400]),
        (b"GET /health HTTP/1.0\r\n\r\n", [200]),
        (b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n", [505]),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", [400, 431]),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: x\r\n" * 20_000 + b"\r\n", [400, 431]),
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", [400, 414, 431]),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX\x00: 1\r\n\r\n", [400]),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX : 1\r\n\r\n", [400]),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", [400]),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505]),
        (b"TRACE /health HTTP/1.1\r\nHost: localhost\r\n\r\n", [405]),
        (b"BREW /health HTTP/1.1\r\nHost: localhost\r\n\r\n", [405]),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", [404]),
        (b"OPTIONS /api/chat HTTP/1.1\r\nHost: localhost\r\n\r\n", [405]),
        (b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", [404]),
        (b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n", [404]),
        (b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n", [200]),
        (b"GET /%00%0d%0aX:1 HTTP/1.1\r\nHost: localhost\r\n\r\n", [404]),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", [200]),
    ],
    ids=lambda value: None if isinstance(value, list) else repr(value[:200])[-60:],
)  # fmt: skip
def test_odd_requests_have_one_answer(port, sent, expected):
    found = statuses(raw(port, sent))
    assert len(found) == 1 and found[0] in expected, found
    assert post(port, "/v1/completions", BODY)[0] == 200


def test_what_follows_a_refused_body_is_no_request(port):
    """A proxy in front that believes the other of two lengths would take the rest for a request of its own."""
    smuggled = HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HEALTH
    assert statuses(raw(port, smuggled, quiet_s=1.0)) == [400]


def test_wrong_chunk_after_the_answer_began_is_no_fault_of_ours(port):
    wrong = HEAD.replace(b"/v1/completions", b"/nothing") + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n"
    with connect(port, wrong) as client:
        assert b"404" in client.recv(65536)
        client.sendall(b"zz\r\n")
        assert is_closed(client, 15)


@pytest.mark.parametrize("path", [b"/v1/completions", b"/nothing", b"/api/version"])
def test_wrong_chunk_that_comes_with_its_header_has_one_answer(port, path):
    """The header alone had begun a request, which finds that its answer was given."""
    head = HEAD.replace(b"/v1/completions", path) + b"Transfer-Encoding: chunked\r\n\r\n"
    assert statuses(raw(port, head + b"zz\r\n")) == [400]
    assert statuses(raw(port, head + b"2\r\n{}\r\nzz\r\n")) == [400]
    raw(port, head.replace(b"POST", b"HEAD") + b"zz\r\n")


def test_methods_that_a_path_has_are_named(port):
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    client.request("OPTIONS", "/v1/models")
    response = client.getresponse()
    assert response.status == 405 and response.headers["Allow"] == "GET"
    client.close()


def test_server_stops_beside_clients_of_every_kind():
    chat = FakeChat(ENDLESS, delay_s=0.01)
    sock = bind("127.0.0.1", 0)
    server = Server(Engine(chat, slots=1), sock, log_level="error")
    thread = threading.Thread(target=server.serve_until_stopped)
    thread.start()
    wait_until(lambda: server.started)
    port = sock.getsockname()[1]
    stream = request(BODY | {"stream": True, "max_tokens": 100})
    with contextlib.ExitStack() as stack:
        for sent in (
            b"",
            b"GET",
            HEALTH,
            HEALTH + b"G",
            HEAD,
            HEAD + b"Content-Length: 9\r\n\r\n{",
            stream,
            stream + b"G",
        ):
            stack.enter_context(connect(port, sent))
        time.sleep(0.3)
        started = time.monotonic()
        server.stop()
        thread.join(60)
        assert not thread.is_alive() and time.monotonic() - started < 15
