"""Answers that end when the client goes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

SILENCE_S = 15.0  # after which a stream says that it is alive; proxies cut connections that say nothing for a minute
CLIENT_GONE = 499  # nobody reads it but the log


async def or_disconnect(request: Request, work: Awaitable[Any], *, close: Callable[[], None]) -> Any:
    """The result of `work`, or a response for nobody if the client goes first.

    Args:
        close: called at the end, also where `work` never began.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=CLIENT_GONE)
    finally:
        close()
        await _cancelled(task, gone)


class EventStream(Response):
    """Sends what `pieces` yields until it ends or the client goes.

    Args:
        close: called at the end, also where `pieces` never began.
        alive: sent when nothing else was for a while.

    Starlette's own notices a client that is gone only when it sends, under servers of newer ASGI versions; the first
    token of a long prompt may take minutes.
    """

    def __init__(
        self, pieces: AsyncIterator[str], media_type: str, *, close: Callable[[], None], alive: str | None = None
    ):
        self._pieces, self._close, self._alive = pieces, close, alive
        super().__init__(media_type=media_type, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        work, gone = asyncio.ensure_future(self._send_all(send)), asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                with contextlib.suppress(OSError):  # the client went while we sent
                    work.result()
        finally:
            self._close()
            await _cancelled(work, gone)

    async def _send_all(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._pieces) as pieces:
            following = asyncio.ensure_future(anext(pieces, None))
            try:
                while True:
                    done, _ = await asyncio.wait({following}, timeout=SILENCE_S if self._alive else None)
                    piece = following.result() if done else self._alive
                    if piece is None:
                        break
                    await send({"type": "http.response.body", "body": piece.encode(), "more_body": True})
                    if done:
                        following = asyncio.ensure_future(anext(pieces, None))
            finally:
                await _cancelled(following)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
