"""A scripted chat model and a running server, for tests of the serving protocols without a model."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from kt_sft.inference.backend import ModelFacts, Sampling, ToolCall

FACTS = ModelFacts(
    name="demo-lora",
    base_name="demo",
    context_length=128,
    default_max_tokens=24,
    vocab_size=256,
    family="mixtral",
    num_parameters=213_900_000,
    weight_format="INT8",
    size_bytes=430_000_000,
    created=1.7e9,
    digest="ab" * 32,
)
HI = [{"role": "user", "content": "hi"}]
ANSWER = "The answer is 4, naïve 🙂 friend."


class FakeChat:
    """Tokens are bytes. Answers with a text, byte by byte; the same for every prompt, or a function of it.

    Args:
        answer: text, or what makes it of (prompt, sampling).
        delay_s: of every token.
        fail_at: token before which it raises.
    """

    def __init__(
        self,
        answer: str | Callable[[str, Sampling], str] = ANSWER,
        *,
        delay_s: float = 0.0,
        fail_at: int | None = None,
        facts: ModelFacts = FACTS,
    ):
        self.facts = facts
        self.delay_s, self.fail_at = delay_s, fail_at
        self._answer = answer
        self.samplings: list[Sampling] = []
        self.prompts: list[str] = []
        self.num_tokens = 0  # of all answers
        self.computing = 0  # threads inside a step: never more than one
        self.overlapped = False
        self.gate = threading.Event()  # answers wait for it after their first token
        self.gate.set()

    def encode_chat(self, messages: list[dict[str, str]], system: str | None, tools: str | None) -> list[int]:
        lines = [f"{message['role']}:{message['content']}" for message in messages]
        return list("|".join([*([f"system:{system}"] if system else []), *([tools] if tools else []), *lines]).encode())

    def encode_text(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def tool_calls(self, text: str) -> list[ToolCall]:
        name, _, arguments = text.removeprefix("CALL ").partition(" ")
        return [ToolCall(name, arguments)] if text.startswith("CALL ") else []

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        on_token: Callable[[int], bool],
        pause: Callable[[], None],
    ) -> str:
        prompt = bytes(prompt_ids).decode(errors="replace")
        self.samplings.append(sampling)
        self.prompts.append(prompt)
        answer = self._answer if isinstance(self._answer, str) else self._answer(prompt, sampling)
        for at, token in enumerate(answer.encode()):
            if at == sampling.max_tokens:
                return "length"
            if at == self.fail_at:
                raise RuntimeError("out of tokens")
            self._step()
            if on_token(token):
                return "stop"
            while not self.gate.is_set():
                pause()
                time.sleep(0.001)
            pause()
        return "stop"

    def _step(self) -> None:
        self.computing += 1
        self.overlapped |= self.computing > 1
        time.sleep(self.delay_s)
        self.num_tokens += 1
        self.computing -= 1


@contextlib.contextmanager
def running(chat: FakeChat, *, api_key: str | None = None, **limits: float) -> Iterator[tuple[str, object]]:
    """A server on a free port of this machine, in a thread: (its address, its engine)."""
    from kt_sft.serving.engine import Engine
    from kt_sft.serving.server import Server, bind

    sock = bind("127.0.0.1", 0)
    engine = Engine(chat, **limits)
    server = Server(engine, sock, api_key=api_key, log_level="error")
    thread = threading.Thread(target=server.serve_until_stopped)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", engine
    finally:
        chat.gate.set()
        server.stop()
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


def wait_until(condition: Callable[[], bool], seconds: float = 60.0, *, every: float = 0.005) -> None:
    """Return when it holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every)
