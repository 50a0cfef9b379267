"""Memory of `kt-sft serve` over hundreds of requests: `python -m benchmarks.soak_serve`.

Requests of all kinds, several at a time: both protocols, streams and whole answers, short and long prompts, clients
that go in mid-stream, bodies that are no JSON, prompts beyond the context. The resident memory of the server process is
read after each; what counts is its growth after a warm-up, in which caches fill and threads have their first work.
Without --config the model is a tiny random one, where a leak is not hidden by the size of the model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

import httpx
import psutil
import yaml

from benchmarks.harness import RESULTS, ROOT, machine_record, save_results

MIB = 1 << 20
WARM_UP = 0.3  # of the requests
MAX_GROWTH_MIB = 16.0  # between the tenth of the samples after the warm-up and the last tenth
PICTURE = "soak-serve.png"


def tiny_config(folder: Path) -> dict[str, object]:
    """A tiny random model with a tokenizer, as LLaMA-Factory's chat takes it."""
    from tests.helpers.llamafactory_runs import infer_config, workspace

    return infer_config(workspace(folder))


class Client:
    """Sends requests of every kind and counts what came of them.

    Args:
        context: of the model, in tokens; short prompts fit, one kind does not.
    """

    def __init__(self, http: httpx.AsyncClient, model: str, context: int):
        self.http, self.model, self.context = http, model, context
        self.outcomes: dict[str, int] = {}
        self._random = random.Random(0)
        self._kinds: Sequence[Callable[[], Awaitable[int]]] = (
            self.chat, self.chat_stream, self.ollama, self.ollama_stream, self.completion, self.chat_stream,
            self.leave, self.chat, self.malformed, self.too_long,
        )  # fmt: skip

    async def send(self, number: int) -> None:
        """One request; anything but the expected status is an error of the soak."""
        kind = self._kinds[number % len(self._kinds)]
        status = await kind()
        expected = 400 if kind in (self.malformed, self.too_long) else 200
        if status != expected:
            raise RuntimeError(f"{kind.__name__}: expected status {expected}, got {status}")
        self.outcomes[kind.__name__] = self.outcomes.get(kind.__name__, 0) + 1

    async def chat(self) -> int:
        return (await self.http.post("/v1/chat/completions", json=self._openai())).status_code

    async def chat_stream(self) -> int:
        return await self._read("/v1/chat/completions", {**self._openai(), "stream": True})

    async def ollama(self) -> int:
        return (await self.http.post("/api/chat", json={**self._ollama(), "stream": False})).status_code

    async def ollama_stream(self) -> int:
        return await self._read("/api/chat", self._ollama())

    async def completion(self) -> int:
        body = {"model": self.model, "prompt": self._text(), "max_tokens": 8, "temperature": 1.0, "n": 2}
        return (await self.http.post("/v1/completions", json=body)).status_code

    async def leave(self) -> int:
        """Goes after the first piece."""
        body = {**self._openai(), "stream": True, "max_tokens": self.context // 4, "ignore_eos": True}
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            await anext(response.aiter_bytes())
            return response.status_code

    async def malformed(self) -> int:
        headers = {"content-type": "application/json"}
        return (await self.http.post("/v1/chat/completions", content=b'{"model": ', headers=headers)).status_code

    async def too_long(self) -> int:
        body = {"model": self.model, "prompt": "word " * 2 * self.context}
        return (await self.http.post("/v1/completions", json=body)).status_code

    async def _read(self, route: str, body: dict) -> int:
        async with self.http.stream("POST", route, json=body) as response:
            async for _ in response.aiter_bytes():
                pass
            return response.status_code

    def _text(self) -> str:
        """At most half of the context, were every character a token."""
        return "x" * self._random.randint(1, min(self.context // 2, 400))

    def _openai(self) -> dict:
        messages = [{"role": "user", "content": self._text()}]
        return {"model": self.model, "messages": messages, "max_tokens": self._random.randint(1, 24)}

    def _ollama(self) -> dict:
        options = {"num_predict": self._random.randint(1, 24), "temperature": 0.8, "seed": 1}
        return {"model": self.model, "messages": [{"role": "user", "content": self._text()}], "options": options}


async def soak(url: str, pid: int, requests: int, concurrent: int) -> tuple[list[float], dict[str, int]]:
    """(resident MiB of the process after each request, counts of what was asked)."""
    process = psutil.Process(pid)
    curve = [process.memory_info().rss / MIB]
    async with httpx.AsyncClient(base_url=url, timeout=900) as http:
        card = (await http.get("/v1/models")).json()["data"][0]
        client = Client(http, card["id"], card["max_model_len"])
        numbers = iter(range(requests))

        async def work() -> None:
            for number in numbers:
                await client.send(number)
                curve.append(process.memory_info().rss / MIB)

        await asyncio.gather(*(work() for _ in range(concurrent)))
        while (await http.get("/health")).json()["active"]:
            await asyncio.sleep(0.05)
    curve.append(process.memory_info().rss / MIB)
    return curve, client.outcomes


def growth(curve: Sequence[float]) -> float:
    """MiB from the first tenth after the warm-up to the last tenth, means of both."""
    settled = curve[int(len(curve) * WARM_UP) :]
    tenth = max(1, len(settled) // 10)
    return fmean(settled[-tenth:]) - fmean(settled[:tenth])


def draw(curve: Sequence[float], model: str, path: Path) -> None:
    """The curve with its warm-up marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4))
    axis.plot(range(len(curve)), curve, color="#0072B2", linewidth=1.5)
    axis.axvspan(0, len(curve) * WARM_UP, color="#eeeeee", zorder=0, label="warm-up")
    axis.set_xlabel("requests answered")
    axis.set_ylabel("resident memory of the server, MiB")
    axis.set_title(f"{model}: {growth(curve):+.1f} MiB after the warm-up", loc="left", fontsize=11)
    axis.set_xlim(0, len(curve))
    axis.set_ylim(0, max(curve) * 1.15)
    axis.grid(True, color="#e4e4e4", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def wait_for_address(server: subprocess.Popen, log: Path) -> str:
    """The address that the server says it listens on, once it answers."""
    while server.poll() is None:
        said = [word for word in log.read_text().split() if word.startswith("http://127.0.0.1:")]
        try:
            if said and httpx.get(f"{said[0]}/health", timeout=60).status_code == 200:
                return said[0]
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"the server ended with status {server.returncode}:\n{log.read_text()[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML of `kt-sft serve` (default: a tiny random model)")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--concurrent", type=int, default=4)
    parser.add_argument("--no-save", action="store_true", help="leave benchmarks/results as it is")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = options.config or Path(folder) / "serve.yaml"
        if options.config is None:
            file.write_text(yaml.safe_dump(tiny_config(Path(folder))))
        log = Path(folder) / "serve.log"
        command = [sys.executable, "-m", "kt_sft.cli", "serve", str(file), "--port", "0", "--log-level", "warning"]
        path = os.pathsep.join([str(ROOT), *sys.path[1:]])
        with log.open("w") as output, subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": path}
        ) as server:  # fmt: skip
            try:
                url = wait_for_address(server, log)
                model = httpx.get(f"{url}/health").json()["model"]
                start = time.monotonic()
                curve, outcomes = asyncio.run(soak(url, server.pid, options.requests, options.concurrent))
                seconds = time.monotonic() - start
            finally:
                server.terminate()
        stopped_cleanly = server.returncode == 0
    case = {
        "model": model,
        "requests": options.requests,
        "concurrent": options.concurrent,
        "seconds": seconds,
        "kinds": outcomes,
        "growth_mib": growth(curve),
        "limit_mib": MAX_GROWTH_MIB,
        "stopped_cleanly": stopped_cleanly,
        "rss_mib": [round(one, 2) for one in curve],
    }
    print(json.dumps({name: value for name, value in case.items() if name != "rss_mib"}, indent=1))
    if not options.no_save:
        machine = machine_record(os.cpu_count() or 1, "as detected")
        saved = save_results(machine, {}, [case], bench="soak_serve", mode="full", folder=RESULTS / "serving")
        picture = saved.with_name(f"{datetime.now(UTC):%Y-%m-%d}-{PICTURE}")
        draw(curve, model, picture)
        print(f"saved to {saved.relative_to(ROOT)} and {picture.relative_to(ROOT)}")
    if case["growth_mib"] > MAX_GROWTH_MIB or not stopped_cleanly:
        raise SystemExit(
            f"grown by {case['growth_mib']:.1f} MiB (limit {MAX_GROWTH_MIB}), clean stop: {stopped_cleanly}"
        )


if __name__ == "__main__":
    main()
