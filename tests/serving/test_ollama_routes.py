"""Ollama's routes, asked in plain HTTP and through the real client."""

from __future__ import annotations

import dataclasses
import json

import httpx
import pytest

from tests.helpers.fake_chat import ANSWER, FACTS, HI, FakeChat, running

LONG = {"num_predict": 64}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client(url):
    ollama = pytest.importorskip("ollama")
    return ollama.Client(host=url)


def test_listing_and_description(client, url):
    listed = client.list().models
    assert [model.model for model in listed] == ["demo-lora", "demo"]
    assert listed[0].size == FACTS.size_bytes and listed[0].details.parameter_size == "213.9M"
    shown = client.show("demo")
    assert shown.modelinfo["mixtral.context_length"] == FACTS.context_length and "completion" in shown.capabilities
    assert client.ps().models[0].model == "demo-lora"
    assert httpx.get(f"{url}/").text == "Ollama is running" and httpx.head(f"{url}/").status_code == 200
    assert httpx.get(f"{url}/api/version").json()["version"]


def test_chat_answers_with_counts_and_times(client, chat):
    answer = client.chat("demo-lora:latest", messages=[{"role": "system", "content": "s"}, *HI], options=LONG)
    assert answer.message.content == ANSWER and answer.done and answer.done_reason == "stop"
    assert (answer.prompt_eval_count, answer.eval_count) == (len("system:s|user:hi"), len(ANSWER.encode()))
    parts = (answer.load_duration, answer.prompt_eval_duration, answer.eval_duration)
    assert all(part > 0 for part in parts) and abs(sum(parts) - answer.total_duration) < 10
    assert chat.prompts[-1] == "system:s|user:hi" and chat.samplings[-1].adapter


@pytest.mark.parametrize("kind", ["chat", "generate"])
def test_streams_carry_the_same_text_and_end_with_a_summary(client, kind):
    if kind == "chat":
        parts = list(client.chat("demo", messages=HI, stream=True, options=LONG))
        text = "".join(part.message.content for part in parts)
    else:
        parts = list(client.generate("demo", "hi", stream=True, options=LONG))
        text = "".join(part.response for part in parts)
    assert text == ANSWER and [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].done_reason == "stop" and parts[-1].eval_count == len(ANSWER.encode())


def test_streaming_is_the_default_and_one_object_a_line(url):
    response = httpx.post(f"{url}/api/generate", json={"model": "demo", "prompt": "x"})
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert len(lines) > 3 and lines[-1]["done_reason"] == "length"


def test_generate_with_and_without_template(client, chat):
    assert client.generate("demo", "hi", system="s", options={"num_predict": 3}).response == "The"
    assert chat.prompts[-1] == "system:s|user:hi"
    client.generate("demo", "hi", raw=True)
    assert chat.prompts[-1] == "hi"


def test_options_reach_the_model_and_unknown_ones_do_not_matter(client, chat):
    options = {
        "temperature": 0.3, "top_p": 0.8, "top_k": 7, "repeat_penalty": 1.2, "seed": 3, "stop": ["z"], "num_predict": 9,
        "num_ctx": 4096, "mirostat": 1,
    }  # fmt: skip
    client.generate("demo", "hi", options=options)
    seen = chat.samplings[-1]
    assert (seen.temperature, seen.top_p, seen.top_k, seen.repetition_penalty) == (0.3, 0.8, 7, 1.2)
    assert (seen.seed, seen.stop, seen.max_tokens, seen.adapter) == (3, ("z",), 9, False)


@pytest.mark.parametrize(("asked", "given"), [(None, FACTS.default_max_tokens), (-1, 121), (-2, 121), (10_000, 121)])
def test_num_predict_is_cut_to_what_fits(client, chat, asked, given):
    client.chat("demo", messages=HI, options={} if asked is None else {"num_predict": asked})
    assert chat.samplings[-1].max_tokens == given  # 128 tokens of context less 7 of the prompt


def test_options_that_ask_for_nothing_are_accepted(client, chat):
    nothing = {"presence_penalty": None, "frequency_penalty": None, "seed": -1, "top_k": -1}
    client.generate("demo", "hi", options=nothing)
    seen = chat.samplings[-1]
    assert (seen.presence_penalty, seen.frequency_penalty, seen.seed, seen.top_k) == (0.0, 0.0, None, 0)


def test_lines_end_where_any_client_sees_their_end():
    ollama = pytest.importorskip("ollama")
    text = "a\u2028b\u2029c\x85d"
    with running(FakeChat(text)) as (url, _):
        parts = list(ollama.Client(host=url).generate("demo", "x", stream=True))
    assert "".join(part.response for part in parts) == text


def test_nothing_to_answer_means_load(client):
    assert client.generate("demo").done_reason == "load" and client.chat("demo").done_reason == "load"


def test_tools_are_called_with_an_object():
    ollama = pytest.importorskip("ollama")
    chat = FakeChat('CALL add {"a": 1}', facts=dataclasses.replace(FACTS, context_length=4096))
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    with running(chat) as (url, _):
        client = ollama.Client(host=url)
        answer = client.chat("demo", messages=HI, tools=[tool])
        call = answer.message.tool_calls[0].function
        assert (call.name, call.arguments) == ("add", {"a": 1})
        parts = list(client.chat("demo", messages=HI, tools=[tool], stream=True))
        assert [bool(part.message.tool_calls) for part in parts] == [True, False]
        result = {"role": "tool", "tool_name": "add", "content": "3"}
        client.chat("demo", messages=[*HI, answer.message, result], tools=[tool])
        assert chat.prompts[-1].endswith("|observation:3")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_penalties_are_numbers(url, value):
    content = f'{{"model": "demo", "prompt": "x", "options": {{"frequency_penalty": {value}}}}}'
    response = httpx.post(f"{url}/api/generate", content=content, headers=JSON)
    assert response.status_code == 400 and "options.frequency_penalty" in response.json()["error"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("chat", {"model": "x", "messages": HI}, 404, "'x' not found; this server has: demo-lora, demo"),
        ("generate", {"model": "x"}, 404, "not found"),
        ("show", {"model": "x"}, 404, "not found"),
        ("chat", {"model": "demo", "messages": HI, "format": "json"}, 400, "format: not supported"),
        ("generate", {"model": "demo", "prompt": "x", "images": ["aGk="]}, 400, "images: not supported"),
        ("generate", {"model": "demo", "prompt": "x" * 10_000}, 400, "context length is 128 tokens"),
        ("generate", {"model": "demo", "prompt": "x", "options": {"temperature": "hot"}}, 400, "options.temperature"),
        (
            "generate",
            {"model": "demo", "prompt": "x", "options": {"presence_penalty": 3}},
            400,
            "options.presence_penalty",
        ),
        ("chat", {"model": "demo", "messages": [*HI, *HI]}, 400, "expected assistant"),
        ("pull", {"model": "demo"}, 404, "/api/pull"),
    ],
)
def test_wrong_requests_get_a_sentence(url, path, body, status, words):
    response = httpx.post(f"{url}/api/{path}", json=body)
    assert response.status_code == status and set(response.json()) == {"error"} and words in response.json()["error"]


def test_malformed_json_is_a_bad_request(url):
    response = httpx.post(f"{url}/api/chat", content=b"{", headers=JSON)
    assert response.status_code == 400 and "not JSON" in response.json()["error"]


def test_fault_in_mid_stream_ends_it_with_an_error():
    ollama = pytest.importorskip("ollama")
    with running(FakeChat(fail_at=4)) as (url, _), pytest.raises(ollama.ResponseError, match="out of tokens"):
        list(ollama.Client(host=url).generate("demo", "x", stream=True))
