"""`kt-sft serve` with LLaMA-Factory and a tiny model, asked by the real clients; and LLaMA-Factory's own `api`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.helpers.fake_chat import wait_until
from tests.helpers.llamafactory_runs import drive, environment, infer_config, train_config, workspace

TRAIN_AND_ANSWER = """
from llamafactory.chat import ChatModel
from llamafactory.train.tuner import run_exp
training, configs, questions = given
run_exp(training)
def answers(config):
    model = ChatModel(config)
    return [model.chat([{"role": "user", "content": one}], max_new_tokens=12)[0].response_text for one in questions]
give([answers(config) for config in configs])
"""
QUESTIONS = [f"add {i} and 1" for i in range(4)]
CONTEXT = 12_000
# Longer than one part of a prompt.
LONG_QUESTION = "add " + " and ".join(str(i) for i in range(60))


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    directory = workspace(tmp_path_factory.mktemp("serving"))
    file = directory / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": CONTEXT}))
    return directory


@pytest.fixture(scope="module")
def alone(work):
    """Answers of LLaMA-Factory's chat model, one after the other: (with an adapter trained here, without)."""
    training = train_config(work, "adapter", max_steps=3, learning_rate=3.0e-2)
    configs = [infer_config(work, adapter_name_or_path=str(work / "adapter")), infer_config(work)]
    return drive(TRAIN_AND_ANSWER, training, configs, [*QUESTIONS, LONG_QUESTION])


@contextlib.contextmanager
def process(command: list[str], work: Path, log_name: str, **env: str) -> Iterator[subprocess.Popen]:
    """A server as a process that stops on a signal within seconds; its log is the message where it does not."""
    log_file = work / log_name
    with log_file.open("w") as log, subprocess.Popen(
        [sys.executable, "-m", *command], env=environment(**env), cwd=work, stdout=log, stderr=log
    ) as server:  # fmt: skip
        try:
            yield server
            server.send_signal(signal.SIGTERM)
            server.wait(120)
        except BaseException:
            server.kill()
            print(log_file.read_text()[-6000:])
            raise


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, server: subprocess.Popen) -> None:
    def answers() -> bool:
        assert server.poll() is None, "the server ended before it answered"
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(url, timeout=60).status_code == 200
        return False

    wait_until(answers, 900, every=0.3)


@pytest.fixture(scope="module")
def served(work, alone):
    """The address of `kt-sft serve` on the adapter; USE_KT is not set, the configuration says it."""
    file = work / "serve.yaml"
    file.write_text(yaml.safe_dump(infer_config(work, adapter_name_or_path=str(work / "adapter"))))
    port = free_port()
    words = ["--port", str(port), "--prefill-chunk", "32", "--slots", "4"]
    with process(["kt_sft.cli", "serve", str(file), *words], work, "serve.log", USE_KT="0") as server:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}"
    log = (work / "serve.log").read_text()
    assert server.returncode == 0 and "Traceback" not in log, log[-6000:]


async def ask(client: httpx.AsyncClient, question: str, model: str) -> str:
    """One streamed answer, at most 12 tokens."""
    body = {"model": model, "messages": messages(question), "max_tokens": 12, "stream": True}
    text = ""
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    text += choice["delta"].get("content") or ""
    return text


def ask_together(url: str, pairs: list[tuple[str, str]]) -> list[str]:
    """Streamed answers to (question, model), all at the same time."""

    async def run() -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=900) as client:
            return list(await asyncio.gather(*(ask(client, *pair) for pair in pairs)))

    return asyncio.run(run())


def test_concurrent_streams_give_the_answers_of_each_alone(served, alone):
    with_adapter, without = alone
    assert with_adapter != without
    questions = [*QUESTIONS, LONG_QUESTION]
    pairs = [(question, model) for question in questions for model in ("adapter", "model")]
    expected = [text for both in zip(with_adapter, without, strict=True) for text in both]
    assert ask_together(served, pairs) == expected


def test_real_clients_and_both_protocols_agree(served, alone):
    openai, ollama = pytest.importorskip("openai"), pytest.importorskip("ollama")
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none", timeout=900, max_retries=0) as client:
        assert {model.id for model in client.models.list()} == {"adapter", "model"}
        answer = client.chat.completions.create(model="adapter", messages=messages(QUESTIONS[0]), max_tokens=12)
        assert answer.choices[0].message.content == alone[0][0]
        assert answer.usage.prompt_tokens > 0 and 0 < answer.usage.completion_tokens <= 12
    client = ollama.Client(host=served, timeout=900)
    parts = list(client.chat("adapter", messages=messages(QUESTIONS[0]), options={"num_predict": 12}, stream=True))
    assert "".join(part.message.content for part in parts) == alone[0][0]
    assert parts[-1].prompt_eval_count == answer.usage.prompt_tokens
    assert parts[-1].eval_count == answer.usage.completion_tokens


def test_seed_repeats_a_sampled_answer_also_beside_others(served):
    body = {"model": "adapter", "messages": messages("add"), "max_tokens": 12, "temperature": 1.5}

    async def run(seeds: list[int]) -> list[str]:
        async with httpx.AsyncClient(base_url=served, timeout=900) as client:
            replies = [client.post("/v1/chat/completions", json={**body, "seed": seed}) for seed in seeds]
            return [reply.json()["choices"][0]["message"]["content"] for reply in await asyncio.gather(*replies)]

    (single,) = asyncio.run(run([3]))
    one, two, three = asyncio.run(run([3, 4, 3]))
    assert one == three == single != two


def complete(url: str, prompt: str, **changes) -> httpx.Response:
    body = {"model": "adapter", "prompt": prompt, "max_tokens": 1, **changes}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=900)


def wait_for_active(url: str, number: int) -> None:
    wait_until(lambda: httpx.get(f"{url}/health", timeout=60).json()["active"] == number, 600, every=0.02)


def test_prompt_of_ten_thousand_tokens_is_answered_and_lets_others_pass(served):
    order = []

    def ask(name: str, prompt: str) -> None:
        order.append((name, complete(served, prompt).json()["usage"]["prompt_tokens"]))

    long = threading.Thread(target=ask, args=("long", "x" * 10_000))
    long.start()
    wait_for_active(served, 1)
    ask("short", "x")
    long.join(900)
    assert order == [("short", 1), ("long", 10_000)]


def test_prompt_beyond_the_context_names_the_limit(served):
    response = complete(served, "x" * 20_000)
    error = response.json()["error"]
    assert response.status_code == 400 and f"context length is {CONTEXT} tokens" in error["message"]


def test_stop_penalties_and_ignored_end(served):
    def create(**changes) -> dict:
        body = {"model": "adapter", "messages": messages("add"), "max_tokens": 40, **changes}
        return httpx.post(f"{served}/v1/chat/completions", json=body, timeout=900).json()

    plain = create(ignore_eos=True)
    text = plain["choices"][0]["message"]["content"]
    assert plain["usage"]["completion_tokens"] == 40 and plain["choices"][0]["finish_reason"] == "length"
    word = text[3:5]
    stopped = create(ignore_eos=True, stop=[word])
    assert stopped["choices"][0]["message"]["content"] == text[: text.index(word)]
    assert stopped["choices"][0]["finish_reason"] == "stop" and stopped["usage"]["completion_tokens"] < 40
    assert create(ignore_eos=True, frequency_penalty=2)["choices"][0]["message"]["content"] != text


@pytest.mark.parametrize("prompt", ["x", "x" * 10_000], ids=["in mid-stream", "in a long prompt"])
def test_client_that_goes_frees_the_model(served, prompt):
    body = {"model": "adapter", "prompt": prompt, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{served}/v1/completions", json=body, timeout=900) as response:
        if len(prompt) == 1:
            next(response.iter_bytes())
        else:
            wait_for_active(served, 1)
    wait_for_active(served, 0)
    assert complete(served, "x").status_code == 200


LOAD = """
from kt_sft.errors import KTError
from kt_sft.integrations.llamafactory import chat
def fault(config):
    try:
        chat.load(config)
    except KTError as error:
        return str(error)
give([fault(config) for config in given[0]])
"""


def test_wrong_configuration_is_refused_before_the_model_loads(work):
    changes = {
        "nowhere/at/all: no such adapter directory; check the path": {"adapter_name_or_path": "nowhere/at/all"},
        "gone: no such adapter directory": {"adapter_name_or_path": str(work / "gone"), "use_kt": None},
        "model_name_or_path: missing": {"model_name_or_path": None},
        "num_beams: expected 1, found 3": {"num_beams": 3},
        "did you mean 'chunk_size'?": {"chunk_sise": 3},
    }
    configs = [infer_config(work, **change) for change in changes.values()]
    for words, found in zip(changes, drive(LOAD, configs, env=environment(use_kt=False)), strict=True):
        assert words in found


def test_command_shows_a_wrong_adapter_in_one_line(work):
    file = work / "wrong.yaml"
    file.write_text(yaml.safe_dump(infer_config(work, adapter_name_or_path="nowhere/at/all")))
    done = subprocess.run(
        [sys.executable, "-m", "kt_sft.cli", "serve", str(file), "--port", "0"],
        capture_output=True, text=True, cwd=work, env=environment(use_kt=False), timeout=900,
    )  # fmt: skip
    assert done.returncode == 2 and "no such adapter directory" in done.stderr, done.stderr[-3000:]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_stock_api_answers_concurrent_streams_as_each_alone(work, alone):
    """`llamafactory-cli api`, four requests computed at the same time."""
    file = work / "api.yaml"
    file.write_text(yaml.safe_dump(infer_config(work, adapter_name_or_path=str(work / "adapter"))))
    port = free_port()
    env = {"API_HOST": "127.0.0.1", "API_PORT": str(port), "MAX_CONCURRENT": "4", "API_VERBOSE": "0"}
    with process(["llamafactory.cli", "api", str(file)], work, "api.log", **env) as server:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/v1/models", server)
        for _ in range(3):
            assert ask_together(url, [(question, "any") for question in QUESTIONS]) == alone[0][:4]
        # A stream that nobody reads any more goes on computing beside the next requests.
        body = {"model": "any", "messages": messages("x"), "max_tokens": 200, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=900) as response:
            next(response.iter_bytes())
        assert ask_together(url, [(question, "any") for question in QUESTIONS]) == alone[0][:4]
