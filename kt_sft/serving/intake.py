"""From a request to the tokens of its prompt: bounded in bytes, in time, and in what one request may hold up.

What is small passes beside what is large: large bodies are parsed and long prompts tokenised one at a time, in a
thread, and only so many of either wait.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from kt_sft.inference.backend import PromptError
from kt_sft.serving import limits
from kt_sft.serving.access import too_long
from kt_sft.serving.allocator import give_back
from kt_sft.serving.bodies import read_object
from kt_sft.serving.engine import Engine
from kt_sft.serving.errors import RequestError
from kt_sft.serving.http import CLIENT_GONE
from kt_sft.serving.sampling import over_context

PIECE_CHARS = 16 << 10  # of a long prompt that are counted at a time
PIECE_SLACK_TOKENS = 64  # a word that is cut may have more tokens than in one piece
SURE_CHARS_PER_TOKEN = 4  # of the context; so many are tokenised without being counted before
TRIM_BYTES = 256 << 10  # a body or prompt after which unused memory is given back
TRIM_DELAY_S = 0.5  # until the answer is sent and its objects are gone

Model = TypeVar("Model", bound=BaseModel)


class Intake:
    """Of one server; used on its event loop."""

    def __init__(self, engine: Engine):
        self._engine, self._backend = engine, engine.backend
        self._context = engine.backend.facts.context_length
        self.large_bytes = self._num_long = 0  # of bodies beyond small ones; prompts
        self._parsing, self._encoding = asyncio.Lock(), asyncio.Lock()
        self._trim: asyncio.TimerHandle | None = None

    @contextlib.asynccontextmanager
    async def body(self, request: Request, model: type[Model]) -> AsyncIterator[Model]:
        """The body as `model`; it counts as waiting while this context is open.

        Raises:
            RequestError: too long, late or cut off, no JSON object, a field that is not what it should be, or the
                bodies of all requests are more than the server holds.
        """
        holding = _Holding(self)
        try:
            yield await self._parsed(await self._received(request, holding), model)
        finally:
            holding.release()

    async def _received(self, request: Request, holding: _Holding) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(limits.BODY_S):
                async for piece in request.stream():
                    body += piece
                    if len(body) > limits.MAX_BODY_BYTES:
                        raise too_long()
                    holding.grow(len(body))
        except TimeoutError:
            message = f"the body was not there within {limits.BODY_S:g} seconds"
            raise RequestError(408, message, code="timeout") from None
        except ClientDisconnect:
            raise RequestError(CLIENT_GONE, "the client went before the end of its request") from None
        return bytes(body)

    async def _parsed(self, body: bytes, model: type[Model]) -> Model:
        if len(body) <= limits.SMALL_BODY_BYTES:
            return _validated(body, model)
        async with self._parsing:
            return await asyncio.to_thread(_validated, body, model)

    async def tokens(
        self, request: Request, texts: Sequence[str], encode: Callable[[], list[int]], *, param: str
    ) -> list[int]:
        """The tokens of a prompt.

        Args:
            texts: that it is made of.
            encode: makes them of it.
            param: field of the request that has them.

        Raises:
            RequestError: it cannot fit into the context, or too many others are ahead of it.
        """
        num_chars = sum(map(len, texts))
        is_long = num_chars > limits.LONG_CHARS or len(texts) > limits.LONG_TURNS
        if is_long and (num_chars > self._context * limits.MAX_CHARS_PER_TOKEN or len(texts) > self._context):
            raise over_context(self._context, f"{num_chars} characters in {len(texts)} parts of the prompt", param)
        with self._engine.place(), _faults_of_prompts(param):
            if not is_long:
                return await asyncio.to_thread(encode)
            async with self._turn_of_long(request):
                if num_chars > self._context * SURE_CHARS_PER_TOKEN:
                    await asyncio.to_thread(self._check_fits, texts, param)
                try:
                    return await asyncio.to_thread(encode)
                finally:
                    self.trim_soon(num_chars)

    @contextlib.asynccontextmanager
    async def _turn_of_long(self, request: Request) -> AsyncIterator[None]:
        if self._num_long >= limits.MAX_LONG_PROMPTS:
            message = f"{limits.MAX_LONG_PROMPTS} other long prompts are being tokenised; try again later"
            raise RequestError(503, message, code="overloaded")
        self._num_long += 1
        try:
            async with self._encoding:
                if await request.is_disconnected():
                    raise RequestError(CLIENT_GONE, "the client went before its prompt was read")
                yield
        finally:
            self._num_long -= 1

    def _check_fits(self, texts: Sequence[str], param: str) -> None:
        """Raise as soon as parts of the prompt have more tokens than the context, without tokenising it as a whole."""
        found = 0
        for piece in _pieces(texts):
            if self._engine.is_closing:
                raise RequestError(503, "the server is shutting down", code="shutting_down")
            found += max(0, len(self._backend.encode_text(piece)) - PIECE_SLACK_TOKENS)
            if found > self._context:
                raise over_context(self._context, f"more than {found} in the prompt", param)

    def trim_soon(self, num_bytes: int) -> None:
        """Give memory back after something large; what the allocator keeps would add up to gigabytes."""
        if num_bytes > TRIM_BYTES and self._trim is None:
            self._trim = asyncio.get_running_loop().call_later(TRIM_DELAY_S, self._trim_now)

    def _trim_now(self) -> None:
        self._trim = None
        asyncio.get_running_loop().run_in_executor(None, give_back)


class _Holding:
    """Of the bytes that all bodies may have together: what a body has beyond a small one."""

    def __init__(self, intake: Intake):
        self._intake, self._bytes = intake, 0

    def grow(self, body_bytes: int) -> None:
        more = max(0, body_bytes - limits.SMALL_BODY_BYTES) - self._bytes
        if self._intake.large_bytes + more > limits.MAX_BODIES_BYTES:
            message = "the bodies of other requests take all memory that is set aside for them; try again later"
            raise RequestError(503, message, code="overloaded")
        self._bytes += more
        self._intake.large_bytes += more

    def release(self) -> None:
        self._intake.large_bytes -= self._bytes
        self._intake.trim_soon(self._bytes)


def _validated(body: bytes, model: type[Model]) -> Model:
    value = read_object(body)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-")) or "the body"
        raise RequestError(400, f"{where}: {first['msg']}", param=where.partition(".")[0]) from None


def _pieces(texts: Sequence[str]) -> Iterator[str]:
    """All text in pieces of one length."""
    held: list[str] = []
    size = 0
    for text in texts:
        at = 0
        while at < len(text):
            part = text[at : at + PIECE_CHARS - size]
            held.append(part)
            at, size = at + len(part), size + len(part)
            if size == PIECE_CHARS:
                yield "".join(held)
                held, size = [], 0
    if held:
        yield "".join(held)


@contextlib.contextmanager
def _faults_of_prompts(param: str) -> Iterator[None]:
    try:
        yield
    except PromptError as error:
        raise RequestError(400, f"{param}: {error}", param=param) from None
