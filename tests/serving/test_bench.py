"""The client that measures servers: what it counts, what it says when there is nothing to count."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.soak_serve import growth
from kt_sft.cli import app
from kt_sft.serving.bench_client import Bench, Record, ServerUnusable, Settings
from kt_sft.serving.bench_report import percentile, summary
from tests.helpers.fake_chat import FACTS, FakeChat, running
from tests.helpers.llamafactory_runs import environment

ROOT = Path(__file__).resolve().parents[2]
LARGE = dataclasses.replace(FACTS, context_length=100_000)


def event(delta: dict, reason: str | None = None, **more) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': reason}], **more})}\n\n"


class Scripted(httpx.AsyncBaseTransport):
    """A server of another make: answers each request by `reply(body) -> (status, text)`."""

    def __init__(self, reply):
        self.reply, self.bodies = reply, []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(json.loads(request.content))
        status, text = self.reply(self.bodies[-1])
        return httpx.Response(status, text=text)


def measure(reply, **changes) -> tuple[list[Record], Scripted]:
    transport = Scripted(reply)
    settings = Settings(**{"url": "http://x/v1", "model": "m", "prompt_tokens": 100, "max_tokens": 8, **changes})
    return asyncio.run(Bench(settings, transport=transport).run()), transport


def words(body: dict) -> int:
    return len(body["messages"][0]["content"].split())


def test_pieces_of_several_tokens_are_counted_by_usage():
    def reply(body):
        usage = {"prompt_tokens": 10 + 2 * words(body), "completion_tokens": 8}
        pieces = (
            event({"role": "assistant", "content": ""}) + event({"content": "ab"}) + event({"content": "cd"}, "stop")
        )
        return 200, pieces + f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

    (record,), transport = measure(reply)
    assert (record.completion_tokens, record.counted_by, len(record.arrivals)) == (8, "usage", 2)
    assert record.prompt_tokens == 100 and words(transport.bodies[-1]) == 45  # 10 of the template, 2 of each word
    assert record.decode_rate == pytest.approx(7 / (record.arrivals[1] - record.arrivals[0]))


def test_server_that_refuses_stream_options_is_counted_by_pieces():
    def reply(body):
        if "stream_options" in body:
            return 400, json.dumps({"error": {"message": "unknown field"}})
        return 200, event({"content": "a"}) + event({"reasoning_content": "b"}) + event(
            {}, "length"
        ) + "data: [DONE]\n\n"

    (record,), _ = measure(reply)
    assert (record.completion_tokens, record.counted_by, record.finish_reason) == (2, "chunks", "length")
    assert record.prompt_tokens == 100


def test_failed_requests_are_reported_and_left_out_of_the_figures():
    seen = []

    def reply(body):
        seen.append(body)
        if len(seen) == 4:
            return 503, '{"error": {"message": "overloaded"}}'
        if len(seen) == 5:
            return 200, event({"content": "a"}) + 'data: {"error": {"message": "fell over"}}\n\n'
        if len(seen) == 6:
            return 200, event({"content": "a"})
        return 200, event({"content": "a"}) + event({}, "stop")

    records, _ = measure(reply, num_requests=4)
    report = summary(Settings("u", "m"), records)
    assert report["num_errors"] == 3 and len(report["requests"]) == 4
    assert report["errors"] == ["HTTP 503: overloaded", "fell over", "the stream ended without a finish_reason"]
    assert report["total"]["completion_tokens"] == 1


def test_end_that_usage_counts_is_waited_for():
    times = {"sent": 0.0, "arrivals": [1.0, 2.0], "finished": 3.0, "ended": 3.5, "completion_tokens": 3}
    assert Record(**times, counted_by="usage", finish_reason="stop").decode_rate == 1.0
    assert Record(**times, counted_by="usage", finish_reason="length").decode_rate == 2.0
    assert Record(**{**times, "completion_tokens": 2}, finish_reason="stop").decode_rate == 1.0
    silent = Record(sent=0.0, finished=9.0, ended=9.0, prompt_tokens=7, completion_tokens=1, counted_by="usage")
    stopped = Record(**times, prompt_tokens=4, counted_by="usage", finish_reason="stop")
    total = summary(Settings("u", "m"), [stopped, silent])["total"]
    assert (total["decode_rate"], total["prefill_rate"], total["completion_tokens"]) == (1.0, 4.0, 4)


def test_finish_reason_is_noted_with_its_time():
    def reply(body):
        return 200, event({"content": "a"}) + event({"content": "b"}) + event({}, "stop")

    (record,), _ = measure(reply)
    assert record.finish_reason == "stop" and record.arrivals[-1] <= record.finished <= record.ended


def test_lines_of_other_servers_end_at_newlines_only():
    choice = {"index": 0, "delta": {"content": "a\u2028b\x85c"}, "finish_reason": "stop"}
    line = f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}"
    for end in ("\n\n", "\r\n\r\n", ""):
        (record,), _ = measure(lambda body, end=end: (200, line + end))
        assert record.error is None and len(record.arrivals) == 1


@pytest.mark.parametrize("reply", [(404, '{"error": "model not found"}'), (200, "data: {not json\n\n"), (502, "")])
def test_server_that_cannot_be_probed_is_an_error(reply):
    with pytest.raises(ServerUnusable, match="http://x/v1/chat/completions: "):
        measure(lambda body: reply)


def test_figures_follow_from_the_times():
    first = Record(
        sent=0.0, arrivals=[1.0, 2.0, 3.0], ended=3.0, prompt_tokens=100, completion_tokens=5, counted_by="usage"
    )
    second = Record(sent=0.5, arrivals=[2.5, 4.5], ended=4.5, prompt_tokens=50, completion_tokens=5, counted_by="usage")
    report = summary(Settings("u", "m", api_key="secret"), [first, second])
    assert (first.first_token_s, first.prefill_rate, first.decode_rate, first.token_gap_s) == (1.0, 100.0, 2.0, 0.5)
    assert report["per_request"]["first_token_s"]["p50"] == 1.5
    assert report["per_request"]["piece_gap_s"]["mean"] == pytest.approx(4 / 3)
    total = report["total"]
    assert total["wall_s"] == 4.5 and total["prefill_rate"] == 150 / 2.5 and total["decode_rate"] == 8 / 3.5
    assert total["output_rate"] == 10 / 4.5 and "secret" not in json.dumps(report)


def test_percentiles_are_numpys():
    values = sorted(np.random.default_rng(0).normal(size=17).tolist())
    for q in (50, 90, 99):
        assert percentile(values, q) == pytest.approx(np.percentile(values, q))


@pytest.mark.parametrize("url", ["http://x", "http://x/", "http://x/v1", "http://x/v1/chat/completions"])
def test_any_form_of_the_address_is_understood(url):
    assert Settings(url, "m").endpoint == "http://x/v1/chat/completions"


def test_command_measures_a_server(tmp_path):
    chat = FakeChat("abcdefgh" * 10, delay_s=0.0005, facts=LARGE)
    file = tmp_path / "speed.json"
    with running(chat) as (url, _):
        done = CliRunner().invoke(
            app,
            ["bench", "serve", "--api-url", url, "--model", "demo", "--prompt-lens", "200,1000", "--max-tokens", "20",
             "--concurrent", "3", "--json", str(file)],
        )  # fmt: skip
    assert done.exit_code == 0 and "counted by usage" in " ".join(done.output.split()), done.output
    small, large = json.loads(file.read_text())["measurements"]
    assert [report["num_requests"] for report in (small, large)] == [3, 3]
    assert large["total"]["completion_tokens"] == 60
    for report, tokens in ((small, 200), (large, 1000)):
        assert all(abs(request["prompt_tokens"] - tokens) < 0.2 * tokens for request in report["requests"])
        assert report["total"]["decode_rate"] > 0 and report["per_request"]["first_token_s"]["p99"] > 0


def test_command_fails_if_every_request_does(tmp_path):
    file = tmp_path / "speed.json"
    with running(FakeChat(facts=dataclasses.replace(FACTS, context_length=1000))) as (url, _):
        words = ["--api-url", url, "--model", "demo", "--prompt-lens", "5000", "--json", str(file)]
        done = CliRunner().invoke(app, ["bench", "serve", *words])
    assert done.exit_code == 1 and "context length is 1000 tokens" in " ".join(done.output.split()), done.output
    assert json.loads(file.read_text())["measurements"][0]["num_errors"] == 1


def test_command_is_content_if_one_length_is_answered():
    with running(FakeChat(facts=dataclasses.replace(FACTS, context_length=1000)), api_key="schlüssel") as (url, _):
        words = ["--api-url", url, "--model", "demo", "--prompt-lens", "100,5000", "--max-tokens", "4"]
        done = CliRunner().invoke(app, ["bench", "serve", *words, "--api-key", "schlüssel"])
    assert done.exit_code == 0 and "context length is 1000 tokens" in " ".join(done.output.split()), done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--api-url", "http://x:abc", "--model", "m"], "--api-url: expected http://HOST:PORT, found 'http://x:abc'"),
        (["--api-url", "http://127.0.0.1:9", "--model", "m"], "ConnectError"),
        (["--api-url", "http://x", "--model", "m", "--prompt-lens", "many"], "--prompt-lens: expected numbers"),
    ],
)
def test_command_cannot_begin(words, message):
    done = CliRunner().invoke(app, ["bench", "serve", *words])
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output


def test_script_understands_underscores():
    chat = FakeChat("ab", facts=LARGE)
    with running(chat) as (url, _):
        words = ["--api_url", url, "--model", "demo", "--prompt_lens", "64", "--max_tokens", "2", "--concurrent", "2"]
        done = subprocess.run(
            [sys.executable, "scripts/test_speed.py", *words], capture_output=True, text=True, cwd=ROOT,
            env=environment(use_kt=False), timeout=300,
        )  # fmt: skip
    assert done.returncode == 0 and "2 of 2 requests" in " ".join(done.stdout.split()), done.stdout + done.stderr


def test_growth_of_memory_is_seen_and_a_warm_up_is_not():
    settled = [100 + min(i, 30) for i in range(200)]
    leaking = [100 + 0.1 * i for i in range(200)]
    assert growth(settled) == 0 and growth(leaking) == pytest.approx(0.1 * 126, rel=0.01)
