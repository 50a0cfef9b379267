"""OpenAI's routes, asked in plain HTTP and through the real client."""

from __future__ import annotations

import dataclasses
import json

import httpx
import pytest

from tests.helpers.fake_chat import ANSWER, FACTS, HI, FakeChat, running

LONG = {"max_tokens": 64}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
LONE_SURROGATE = rb'{"model": "demo", "messages": [{"role": "user", "content": "\ud800"}]}'


@pytest.fixture(scope="module")
def client(url):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(url: str, path: str = "/v1/chat/completions", **body) -> httpx.Response:
    return httpx.post(url + path, json={"model": "demo-lora", "messages": HI, **body}, timeout=60)


def events(text: str) -> list:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["demo-lora", "demo"]
    assert client.models.retrieve("demo").max_model_len == FACTS.context_length


def test_chat_answers_with_usage(client, chat):
    answer = client.chat.completions.create(model="demo-lora", messages=HI, **LONG)
    assert answer.choices[0].message.content == ANSWER and answer.choices[0].finish_reason == "stop"
    tokens = len(ANSWER.encode())
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len("user:hi"), tokens)
    assert answer.usage.total_tokens == len("user:hi") + tokens


def test_chat_streams_the_same_text_and_one_usage(client):
    stream = client.chat.completions.create(
        model="demo-lora", messages=HI, stream=True, stream_options={"include_usage": True}, **LONG
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert text == ANSWER and reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(ANSWER.encode())


def test_stream_without_usage_has_none_and_ends_with_done(url):
    response = post(url, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert all("usage" not in event for event in events(response.text))


def test_conversation_and_system_prompt_reach_the_model(client, chat):
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    client.chat.completions.create(model="demo-lora", messages=messages)
    assert chat.prompts[-1] == "system:be kind|user:ab|assistant:c|user:d"


def test_settings_reach_the_model(client, chat):
    client.chat.completions.create(
        model="demo", messages=HI, max_completion_tokens=5, temperature=0.5, top_p=0.9, seed=11, stop="zz",
        presence_penalty=0.5, frequency_penalty=-0.5, extra_body={"top_k": 3, "ignore_eos": True},
    )  # fmt: skip
    seen = chat.samplings[-1]
    assert (seen.max_tokens, seen.temperature, seen.top_p, seen.top_k, seen.seed) == (5, 0.5, 0.9, 3, 11)
    assert (seen.stop, seen.presence_penalty, seen.frequency_penalty) == (("zz",), 0.5, -0.5)
    assert seen.ignore_eos and not seen.adapter


def test_limits_of_an_answer(client, chat):
    assert post(str(client.base_url).removesuffix("/v1/")).json()["choices"][0]["finish_reason"] == "length"
    assert chat.samplings[-1].max_tokens == FACTS.default_max_tokens
    answer = client.chat.completions.create(model="demo-lora", messages=HI, stop=["4,", "never"], **LONG)
    assert answer.choices[0].message.content == "The answer is " and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len("The answer is 4,")


def test_several_choices(client, chat):
    answer = client.chat.completions.create(model="demo-lora", messages=HI, n=3, seed=5, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(sampling.seed for sampling in chat.samplings[-3:]) == [5, 6, 7]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len("user:hi"), 12)
    texts = {0: "", 1: ""}
    for chunk in client.chat.completions.create(model="demo-lora", messages=HI, n=2, stream=True, max_tokens=4):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: "The ", 1: "The "}


def test_completions(client, chat):
    answer = client.completions.create(model="demo-lora", prompt=["one", "two"], max_tokens=3, n=2)
    assert [choice.text for choice in answer.choices] == ["The"] * 4 and set(chat.prompts[-4:]) == {"one", "two"}
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 12)
    assert client.completions.create(model="demo-lora", prompt=[104, 105]).choices[0].finish_reason == "length"
    assert chat.prompts[-1] == "hi" and chat.samplings[-1].max_tokens == 16
    stream = client.completions.create(model="demo-lora", prompt="x", max_tokens=64, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == ANSWER


def test_completions_go_on_with_the_text_and_chats_begin_one():
    chat = FakeChat(" b")
    chat.decode = lambda ids: bytes(ids).decode("utf-8", "replace").removeprefix(" ")  # as SentencePiece
    with running(chat) as (url, _):
        assert post(url).json()["choices"][0]["message"]["content"] == "b"
        assert post(url, "/v1/completions", prompt="a").json()["choices"][0]["text"] == " b"
        body = {"model": "demo", "prompt": "a", "stream": False}
        for raw, text in ((True, " b"), (False, "b")):
            assert httpx.post(f"{url}/api/generate", json={**body, "raw": raw}).json()["response"] == text


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_tools_are_called():
    openai = pytest.importorskip("openai")
    chat = FakeChat('CALL add {"a": 1}', facts=dataclasses.replace(FACTS, context_length=4096))
    with running(chat) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = client.chat.completions.create(model="demo", messages=HI, tools=[TOOL])
        call = answer.choices[0].message.tool_calls[0]
        assert (call.function.name, call.function.arguments) == ("add", '{"a": 1}')
        assert answer.choices[0].finish_reason == "tool_calls" and "add" in chat.prompts[-1]
        chunks = list(client.chat.completions.create(model="demo", messages=HI, tools=[TOOL], stream=True))
        assert chunks[-2].choices[0].delta.tool_calls[0].function.name == "add"
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        message = answer.choices[0].message.model_dump(exclude_none=True)
        result = {"role": "tool", "tool_call_id": call.id, "content": "3"}
        client.chat.completions.create(model="demo", messages=[*HI, message, result], tools=[TOOL])
        assert chat.prompts[-1].endswith("|observation:3") and "function:" in chat.prompts[-1]


@pytest.mark.parametrize(
    ("changes", "status", "param", "words"),
    [
        ({"model": "gpt-9"}, 404, "model", "'gpt-9' not found; this server has: demo-lora, demo"),
        ({"model": None}, 400, "model", "string"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": "hi"}, 400, "messages", "list"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages", "found 'king'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages", "expected user or tool"),
        ({"messages": [*HI, *HI]}, 400, "messages", "messages.1.role: expected assistant, found 'user'"),
        ({"messages": [{"role": "user"}]}, 400, "messages", "missing"),
        ({"messages": [*HI, {"role": "assistant", "content": "x"}]}, 400, "messages", "last one from user"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "text only"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1000}, 400, "messages", "context length is 128 tokens, and the request has 7"),
        ({"temperature": -1}, 400, "temperature", "greater"),
        ({"top_p": 2}, 400, "top_p", "less"),
        ({"n": 99}, 400, "n", "less"),
        ({"stop": [""]}, 400, "stop", "none of them empty"),
        ({"n": 7}, 400, "n", "at most 6 answers, all that this server takes at a time, found 7"),
        ({"top_k": -2}, 400, "top_k", "greater than or equal to -1"),
        ({"messages": [*HI, CALL | {"content": "well"}, *HI]}, 400, "messages", "messages.1: templates take either"),
        ({"tool_choice": "required"}, 400, "tool_choice", "'none' or 'auto'"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, 400, "tool_choice", "'none' or 'auto'"),
        ({"parallel_tool_calls": False}, 400, "parallel_tool_calls", "not supported"),
        ({"min_p": 0.5}, 400, "min_p", "not supported"),
        ({"min_tokens": 5}, 400, "min_tokens", "not supported"),
        ({"stop_token_ids": [97]}, 400, "stop_token_ids", "not supported"),
        ({"guided_json": {}}, 400, "guided_json", "not supported"),
        ({"logprobs": True}, 400, "logprobs", "not supported"),
        ({"logprobs": 0}, 400, "logprobs", "not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests_get_an_error_that_names_the_field(url, changes, status, param, words, stream):
    response = post(url, **changes, stream=stream)
    error = response.json()["error"]
    assert response.status_code == status and error["param"] == param and words in error["message"], error
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"prompt": ["x"] * 7}, "prompt", "prompt: expected at most 6 answers"),
        ({"prompt": ["x"] * 2, "n": 4}, "n", "found 8"),
        ({"logprobs": 0}, "logprobs", "not supported"),
    ],
)
def test_wrong_completions_get_an_error_that_names_the_field(url, changes, param, words):
    response = post(url, "/v1/completions", **{"prompt": "x", **changes})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param) and words in error["message"], error


def test_fields_that_ask_for_nothing_are_accepted(url, chat):
    nothing = {"tool_choice": "auto", "parallel_tool_calls": True, "min_p": 0, "logprobs": False, "logit_bias": {}}
    for top_k in (-1, 0):
        assert post(url, **nothing, top_k=top_k).status_code == 200 and chat.samplings[-1].top_k == 0
    spaces = [*HI, {**CALL, "content": " "}, {"role": "tool", "content": "3"}]
    assert post(url, messages=spaces, tool_choice="none").status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_lines_end_where_any_client_sees_their_end(path):
    text = "a\u2028b\u2029c\x85d"
    prompt = {"messages": HI} if "chat" in path else {"prompt": "x"}
    body = {"model": "demo", "stream": True, "stream_options": {"include_usage": True}, **prompt}
    with running(FakeChat(text)) as (url, _), httpx.stream("POST", url + path, json=body, timeout=60) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    assert "".join(one.get("text") or one.get("delta", {}).get("content") or "" for one in choices) == text


def test_prompt_beyond_the_context_names_the_limit(url):
    response = post(url, messages=[{"role": "user", "content": "x" * 10_000}])
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == "context_length_exceeded"
    assert "context length is 128 tokens" in error["message"] and "10005" in error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": "demo"', LONE_SURROGATE]
)
def test_malformed_json_is_a_bad_request(url, body):
    response = httpx.post(f"{url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_large_body_is_refused(url):
    response = httpx.post(f"{url}/v1/chat/completions", content=b"x" * (17 << 20), timeout=60)
    assert response.status_code == 413 and "16 MiB" in response.json()["error"]["message"]


@pytest.mark.parametrize(("path", "method", "status"), [("/v1/nothing", "GET", 404), ("/v1/models", "POST", 405)])
def test_wrong_routes_have_the_shape_of_errors(url, path, method, status):
    response = httpx.request(method, url + path)
    assert response.status_code == status and path in response.json()["error"]["message"]


def test_key_is_asked_for():
    with running(FakeChat(), api_key="sesame") as (url, _):
        for headers in ({}, {"Authorization": "Bearer open"}, {"Authorization": "sesame"}):
            response = httpx.get(f"{url}/v1/models", headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert httpx.post(f"{url}/api/chat", json={}, headers=headers).status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200


def test_key_may_have_any_letters():
    with running(FakeChat(), api_key="schlüssel") as (url, _):
        for given, status in (("schlüssel", 200), ("schlussel", 401)):
            headers = {b"Authorization": f"Bearer {given}".encode()}
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status


def test_fault_in_mid_stream_is_an_error_event():
    openai = pytest.importorskip("openai")
    chat = FakeChat(fail_at=4)
    with running(chat) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        seen = []
        with pytest.raises(openai.APIError, match="out of tokens"):
            for chunk in client.chat.completions.create(model="demo", messages=HI, stream=True):
                seen.append(chunk.choices[0].delta.content)
        assert "".join(seen) == "The "
        with pytest.raises(openai.InternalServerError, match="out of tokens"):
            client.chat.completions.create(model="demo", messages=HI)
