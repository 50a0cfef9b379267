"""Runs generations: a queue in order of arrival, a fixed number of slots, turns of one token between them.

One computation at a time keeps answers independent of what else is asked: the kernels use all cores anyway. Turns let
every stream move, so a short question need not wait for the end of a long answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from kt_sft.inference.backend import ChatBackend, Sampling
from kt_sft.serving.errors import RequestError
from kt_sft.serving.text import TextStream
from kt_sft.serving.turns import Turns

logger = logging.getLogger(__name__)
CONTEXT_TOKENS = 8  # of a text, enough for the characters at its end


class Cancelled(Exception):
    """Raised within `generate` where nobody wants the answer any more."""


@dataclass
class Timing:
    """Seconds of `time.perf_counter` at which a generation came, got a slot, had its first token, and ended."""

    arrived: float
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None


class Generation:
    """One answer: iterate over it for the text, piece by piece; the numbers are there when the iteration ends.

    `cancel` may come from any thread, any number of times, also after the end.
    """

    def __init__(self, engine: Engine, prompt_ids: Sequence[int], sampling: Sampling, *, continues_text: bool):
        self.prompt_ids, self.sampling, self.continues_text = prompt_ids, sampling, continues_text
        self.finish_reason: str | None = None
        self.completion_tokens = 0
        self.timing = Timing(time.perf_counter())
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._timer = self._loop.call_later(engine.timeout_s, self._time_out)  # keeps this object alive

    def cancel(self, error: Exception | None = None) -> None:
        """End it at the next token, and its iteration now.

        Args:
            error: that the iteration raises; None where nobody listens.
        """
        self._cancelled.set()
        self._engine.withdraw(self)
        self.put(error or Cancelled())
        with contextlib.suppress(RuntimeError):  # the loop is closed, and its timers with it
            self._loop.call_soon_threadsafe(self._timer.cancel)

    def check(self) -> None:
        """Raise `Cancelled` if it was."""
        if self._cancelled.is_set():
            raise Cancelled

    def put(self, event: str | Exception | None) -> None:
        """Hand text, the end (None) or an error to the iteration; from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody listens
            self._cancelled.set()

    async def __aiter__(self) -> AsyncIterator[str]:
        try:
            while (event := await self._events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.cancel()

    async def text(self) -> str:
        """The whole answer."""
        return "".join([piece async for piece in self])

    def _time_out(self) -> None:
        limit = self._engine.timeout_s
        message = f"no complete answer within {limit:g} seconds, the time-out of this server; ask for fewer tokens"
        self.cancel(RequestError(504, message, code="timeout"))


class Engine:
    """Queue, slots and turns in front of a model.

    Args:
        slots: generations that move at the same time; each holds a KV cache.
        max_waiting: further ones that wait for a slot when all are taken; more are refused.
        timeout_s: of a request, waiting included.
    """

    def __init__(self, backend: ChatBackend, *, slots: int = 4, max_waiting: int = 64, timeout_s: float = 600.0):
        self.backend = backend
        self.slots, self.max_waiting, self.timeout_s = slots, max_waiting, timeout_s
        self._turns = Turns()
        self._changed = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._active: set[Generation] = set()
        self._num_preparing = 0
        self._is_closing = False
        # Threads that stay: torch keeps an OpenMP team for every thread that ever computed.
        self._threads = [threading.Thread(target=self._work, name=f"slot-{i}", daemon=True) for i in range(slots)]
        for thread in self._threads:
            thread.start()

    @property
    def is_closing(self) -> bool:
        """Whether `close` was called."""
        return self._is_closing

    @property
    def capacity(self) -> int:
        """Generations that it takes at a time."""
        return self.slots + self.max_waiting

    def submit(self, prompt_ids: Sequence[int], sampling: Sampling, *, continues_text: bool = False) -> Generation:
        """Queue a generation; call it from the event loop that will iterate over it.

        Args:
            continues_text: the answer goes on with the prompt's text, so it may begin with a space.

        Raises:
            RequestError: too many wait, or the server stops.
        """
        with self._changed:
            self._check_room(0)
            generation = Generation(self, prompt_ids, sampling, continues_text=continues_text)
            self._waiting.append(generation)
            self._changed.notify()
        return generation

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Within it a prompt is made ready that is going to be submitted; not for nothing, if there is no place.

        Raises:
            RequestError: as `submit`.
        """
        with self._changed:
            self._check_room(self._num_preparing)
            self._num_preparing += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_preparing -= 1

    def _check_room(self, num_preparing: int) -> None:
        if self._is_closing:
            raise RequestError(503, "the server is shutting down", code="shutting_down")
        if len(self._active) + len(self._waiting) + num_preparing >= self.capacity:
            message = f"{self.slots} requests are being answered and {self.max_waiting} wait; try again later"
            raise RequestError(503, message, code="overloaded")

    def withdraw(self, generation: Generation) -> None:
        """Take a generation out of the queue, if it is still there."""
        with self._changed:
            if generation in self._waiting:
                self._waiting.remove(generation)

    def counts(self) -> tuple[int, int]:
        """Generations that (have a slot, wait for one)."""
        with self._changed:
            return len(self._active), len(self._waiting)

    def close(self) -> None:
        """Refuse what comes from now on and end what is running at its next token; from any thread."""
        with self._changed:
            self._is_closing = True
            generations = [*self._active, *self._waiting]
            self._changed.notify_all()
        for generation in generations:
            generation.cancel(RequestError(503, "the server is shutting down", code="shutting_down"))

    def join(self, timeout_s: float) -> bool:
        """Wait for the slots after `close`; False if one still computes."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (generation := self._next()) is not None:
            try:
                self._run(generation)
            except Cancelled:
                pass
            except Exception as error:
                logger.exception("generation failed")
                generation.put(RequestError(500, f"generation failed: {type(error).__name__}: {error}"))
            finally:
                with self._changed:
                    self._active.discard(generation)
            del generation  # else this thread keeps it until the next one comes

    def _next(self) -> Generation | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            if not self._waiting:
                return None
            generation = self._waiting.popleft()
            self._active.add(generation)
            return generation

    def _run(self, generation: Generation) -> None:
        timing = generation.timing
        context = generation.prompt_ids[-CONTEXT_TOKENS:] if generation.continues_text else ()
        text = TextStream(self.backend.decode, generation.sampling.stop, context=context)

        def on_token(token: int) -> bool:
            generation.completion_tokens += 1
            if timing.first_token is None:
                timing.first_token = time.perf_counter()
            if piece := text.push(token):
                generation.put(piece)
            return text.stopped

        def pause() -> None:
            generation.check()
            self._turns.rotate()
            generation.check()

        with self._turns.turn():
            generation.check()
            timing.started = time.perf_counter()
            reason = self.backend.generate(generation.prompt_ids, generation.sampling, on_token=on_token, pause=pause)
        if piece := text.finish():
            generation.put(piece)
        timing.ended = time.perf_counter()
        generation.finish_reason = "stop" if text.stopped else reason
        generation.put(None)
