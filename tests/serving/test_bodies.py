"""JSON, fields and prompts from strangers: refused with 400, cheaply, and without a trace in the server."""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
import threading
import time

import httpx
import pytest

from kt_sft.serving import limits
from kt_sft.serving.bodies import read_object
from kt_sft.serving.errors import RequestError
from kt_sft.serving.messages import ChatMessage, conversation
from tests.helpers.fake_chat import FACTS, HI, FakeChat, running, wait_until
from tests.helpers.hostile_clients import many_messages, post, raw, statuses

ROUTES = ("/v1/chat/completions", "/v1/completions", "/api/chat", "/api/generate")
JSON = {"Content-Type": "application/json"}
HEAD = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
CHAT = {"model": "demo", "messages": HI}


@pytest.fixture(autouse=True)
def no_traceback(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.exc_info] == []


def refusal(body: bytes) -> str:
    with pytest.raises(RequestError) as found:
        read_object(body)
    assert found.value.status == 400
    return found.value.message


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"a": 1, "a": 2}', "the name 'a' twice"),
        (b'{"b": [{"a": 1, "\\u0061": 2}]}', "the name 'a' twice"),
        (b'{"' + b"x" * 10_000 + b'": 1, "' + b"x" * 10_000 + b'": 2}', "twice"),
        (b"\xff\xfe{\x00}\x00", "expected UTF-8, found byte 0xff at 0"),
        ('{"a": 1}'.encode("utf-16-le"), "not JSON"),
        (b'{"a": "\xed\xa0\x80"}', "expected UTF-8"),
        (b'{"a": "\xc0\xaf"}', "expected UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"a": [["\\ud800x"]]}', "surrogate"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not JSON"),
        (b'{"a": 1}}', "not JSON"),
        (b'{"a": "\n"}', "not JSON"),
        (b'{"a":' + b"[" * 65 + b"]" * 65 + b"}", "deeper than 64"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "at most 65536 arrays"),
        (b'{"a":' * 60_000 + b"1" + b"}" * 60_000, "deeper than 64"),
        (b"[" * 5000, "not JSON"),
        (b'{"a": [' + b"[]," * 100_000 + b"[]]}", "at most 65536 arrays"),
        (b'{"a": [' + b"0," * 2_000_000 + b"0]}", "1048576 values"),
        (b'{"a": "x\\"[[", "b": [' + b'"[,",' * 2_000_000 + b"0]}", "1048576 values"),
        (b'"' + b'\\"' * 1_000_000 + b"," * 2_000_000, "not JSON"),
        (b'"' + b"\\" * 1_000_001 + b"," * 2_000_000 + b"\\", "not JSON"),
    ],
)  # fmt: skip
def test_json_that_is_none_or_too_much_is_refused_at_once(body, words):
    started = time.process_time()
    message = refusal(body)
    assert words in message or ("[[[" in str(body[:9]) and "deeper" in message), message
    assert time.process_time() - started < 2 and len(message) < 600


@pytest.mark.parametrize(
    "body",
    [
        b'\xef\xbb\xbf{"a": "\\ud83d\\ude00", "b": {"a": 1}}',
        b'{"a": "' + b"[{," * 1_000_000 + b'\\"", "b": "' + b"," * 2_000_000 + b'"}',
        b'{"a":' + b"[" * 62 + b"]" * 62 + b"}",
    ],
)
def test_text_may_hold_any_number_of_brackets(body):
    assert read_object(body) == json.loads(body)


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e999", "-1", '"0.5"', "true", "[]", "{}", "1e400", "3"]
)
@pytest.mark.parametrize("field", ["temperature", "top_p", "presence_penalty", "repetition_penalty"])
def test_numbers_are_finite_numbers_in_their_ranges(url, field, value):
    if (field, value) in (("presence_penalty", "-1"), ("repetition_penalty", "3")):
        return
    ollama = {"repetition_penalty": "repeat_penalty"}.get(field, field)
    for path, fields in (
        ("/v1/chat/completions", f'"{field}": {value}'),
        ("/api/chat", f'"options": {{"{ollama}": {value}}}'),
    ):
        if path == "/api/chat" and (field, value) == ("temperature", "3"):
            continue
        content = json.dumps(CHAT)[:-1] + f", {fields}}}"
        response = httpx.post(url + path, content=content, headers=JSON)
        assert response.status_code == 400 and field.partition("_")[2] in response.text, response.text


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": True}, {"max_tokens": "5"}, {"max_tokens": 2.5}, {"max_tokens": 1e300}, {"max_tokens": -1},
        {"max_tokens": 10**100}, {"n": 0}, {"n": 1e9}, {"n": True}, {"seed": 2**63}, {"seed": 1.5}, {"seed": "1"},
        {"top_k": -2}, {"top_k": 0.5}, {"stop": [""]}, {"stop": ["x"] * 17}, {"stop": [1]}, {"stop": {"a": 1}},
        {"stop": "x" * 2000}, {"stop": [["x"]]}, {"stream": 1}, {"stream": "yes"}, {"logprobs": True},
        {"top_logprobs": 5}, {"repetition_penalty": 1e-300}, {"model": ["demo"]}, {"model": "x" * 1_000_000},
        {"messages": [1] * 60_000}, {"messages": [{}] * 60_000}, {"messages": {"role": "user"}},
        {"messages": [{"role": "x" * 1_000_000, "content": ""}]}, {"messages": [{"role": "user", "content": [[]]}]},
        {"tools": [{"type": "function", "function": 1}]}, {"tools": "f"}, {"stream_options": []},
    ],
    ids=lambda changes: str(changes)[:40],
)  # fmt: skip
def test_fields_of_odd_types_and_ranges_are_refused(url, changes):
    response = httpx.post(f"{url}/v1/chat/completions", json=CHAT | changes, timeout=60)
    assert response.status_code in (400, 404) and len(response.content) < 2000
    options = {"num_predict" if name == "max_tokens" else name: value for name, value in changes.items()}
    if set(options) <= {"num_predict", "seed", "top_k", "stop"} and options not in (
        {"num_predict": -1},
        {"num_predict": 1e300},
        {"num_predict": 10**100},
    ):
        assert httpx.post(f"{url}/api/chat", json=CHAT | {"options": options}).status_code == 400


@pytest.mark.parametrize(
    "prompt", [[1.5] * 500_000, [True], [[1], 2], [[[1]]], [-1], [2**70], [256], [], [[]], {"a": 1}, 5]
)
def test_prompts_of_odd_types_are_refused(url, prompt):
    response = httpx.post(f"{url}/v1/completions", json={"model": "demo", "prompt": prompt}, timeout=60)
    assert (
        response.status_code == 400 and response.json()["error"]["param"] == "prompt" and len(response.content) < 2000
    )


def test_whole_numbers_may_be_written_with_a_point(url, chat):
    changes = {"max_tokens": 3.0, "top_k": 5.0, "seed": 7.0, "temperature": 1}
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT | changes).status_code == 200
    sampling = chat.samplings[-1]
    assert (sampling.max_tokens, sampling.top_k, sampling.seed) == (3, 5, 7)


@pytest.mark.parametrize("temperature", [0, -0.0, 5e-324, 1e-30, 1e-7])
def test_small_temperatures_are_answered(url, temperature):
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"temperature": temperature}).status_code == 200
    assert httpx.post(f"{url}/api/chat", json=CHAT | {"options": {"temperature": temperature}}).status_code == 200


def test_results_of_tools_are_joined_in_linear_time():
    """Appended to one text they would copy it for every result."""
    results = [ChatMessage(role="tool", content="x" * 200) for _ in range(60_000)]
    call = ChatMessage.model_validate({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]})
    started = time.process_time()
    turns, _ = conversation([ChatMessage(role="user", content="hi"), call, *results])
    assert time.process_time() - started < 2 and len(turns) == 3 and len(turns[2]["content"]) == 60_000 * 201 - 1


def long_running(**more):
    return running(FakeChat(facts=dataclasses.replace(FACTS, context_length=100_000)), **more)


@pytest.mark.parametrize("path", ROUTES)
def test_prompts_beyond_the_context_are_never_tokenised_as_a_whole(path):
    with long_running() as (url, engine):
        pieces: list[int] = []
        encode_text = engine.backend.encode_text
        engine.backend.encode_text = lambda text: pieces.append(len(text)) or encode_text(text)
        engine.backend.encode_chat = lambda *turns: pytest.fail("tokenised")
        port = int(url.rsplit(":", 1)[1])
        for size in (15_000_000, 1_000_000):  # beyond any count of tokens; only counting tells
            text = "x" * size
            if "chat" in path:
                prompt = {"messages": [{"role": "user", "content": text}]}
            else:
                prompt = {"prompt": text, "raw": True}
            status, answer = post(port, path, {"model": "demo", **prompt})
            assert status == 400 and b"context length is 100000 tokens" in answer
        assert max(pieces) <= 16 << 10 and sum(pieces) < 200_000


def test_hundred_thousand_messages_are_refused_at_once():
    with long_running() as (url, _):
        port = int(url.rsplit(":", 1)[1])
        for count in (100_001, 60_001):
            started = time.monotonic()
            assert many_messages(port, "demo", count) == 400
            assert time.monotonic() - started < 10


def test_long_prompts_wait_for_one_another_and_short_ones_do_not():
    with long_running(max_waiting=64) as (url, engine):
        port, gate = int(url.rsplit(":", 1)[1]), threading.Event()
        encode_text = engine.backend.encode_text
        engine.backend.encode_text = lambda text: (len(text) > 1000 and gate.wait(60), encode_text(text))[1]
        body = {"model": "demo", "prompt": "x" * (limits.LONG_CHARS + 1), "max_tokens": 1}
        found: list[int] = []
        threads = [
            threading.Thread(target=lambda: found.append(post(port, "/v1/completions", body)[0]))
            for _ in range(limits.MAX_LONG_PROMPTS + 3)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: found == [503] * 3)
        assert post(port, "/v1/completions", body | {"prompt": "hi"}, timeout_s=5)[0] == 200
        gate.set()
        for thread in threads:
            thread.join(60)
        assert sorted(found) == [200] * limits.MAX_LONG_PROMPTS + [503] * 3


def test_waiting_bodies_have_a_bound_in_all(monkeypatch):
    monkeypatch.setattr(limits, "MAX_BODIES_BYTES", 1 << 20)
    head = HEAD % (b"/v1/completions", 1_000_000)
    with running(FakeChat()) as (url, _):
        port = int(url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(head + b" " * 900_000)
            for _ in range(20):  # by then the server has read it, too
                assert post(port, "/v1/completions", CHAT | {"prompt": "hi"})[0] == 200
            assert post(port, "/v1/completions", b" " * 900_000)[0] == 503
            assert post(port, "/v1/completions", CHAT | {"prompt": "hi"})[0] == 200
        wait_until(lambda: post(port, "/v1/completions", b" " * 900_000)[0] == 400, 10)  # who went holds nothing


def test_body_that_does_not_come_is_told_so(monkeypatch):
    monkeypatch.setattr(limits, "BODY_S", 0.3)
    with running(FakeChat()) as (url, _):
        port = int(url.rsplit(":", 1)[1])
        assert statuses(raw(port, HEAD % (b"/api/chat", 100) + b"{")) == [408]
