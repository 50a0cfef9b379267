"""One connection: uvicorn's, with limits on everything that the server waits for its client to do.

uvicorn waits for ever for the end of a header, for a client to read, and for the rest of a body that was answered; a
few hundred such clients would keep all others out.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Collection, Iterable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from kt_sft.serving import limits

# What a connection waits for its client to do -> seconds that it may take. The body's time is told to the client by
# who reads it; here it has a little more.
LIMITS_S = {
    "header": limits.HEADER_S,
    "drain": limits.DRAIN_S,
    "write": limits.WRITE_S,
    "body": limits.BODY_S + limits.DRAIN_S,
}
_FRESH_S = 1.0
_TURNS = 3  # of the event loop, from a new connection to its first data
TOO_LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class Connection(H11Protocol):
    """Of one client."""

    def connection_made(self, transport: Any) -> None:
        self._early = bytearray()
        self._num_requests = 0
        self._wait: tuple[str | None, int] = ("header", 0)
        self._wait_began = time.monotonic()
        super().connection_made(transport)
        if len(self.connections) > limits.MAX_CONNECTIONS and not getattr(self.server_state, "makes_room", False):
            self.server_state.makes_room = True
            self.loop.call_soon(self._make_room, _TURNS)

    def _make_room(self, turns: int) -> None:
        """Wait until what clients have sent by now is read: those that are waited for then have sent nothing."""
        if turns:
            self.loop.call_soon(self._make_room, turns - 1)
        else:
            self.server_state.makes_room = False
            make_room(self.connections)

    def data_received(self, data: bytes) -> None:
        if not self._is_answering():
            self._receive(data)
        elif self.conn.their_state in (h11.DONE, h11.MIGHT_SWITCH_PROTOCOL):
            self._early += data
            if len(self._early) > limits.MAX_EARLY_BYTES:
                self.transport.abort()
        elif self.conn.their_state is h11.SEND_BODY:
            self._receive(data)
        if self._is_answering() and self.conn.their_state is not h11.SEND_BODY:
            self.flow.resume_reading()  # uvicorn stops at a further request; then nobody would see the client leave

    def _receive(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except ValueError:  # h11 turns any number of digits into a number, Python not
            self.send_400_response("Invalid HTTP request received.")

    def on_response_complete(self) -> None:
        self._num_requests += 1
        super().on_response_complete()
        early, self._early = bytes(self._early), bytearray()
        if early and not self.transport.is_closing():
            self.data_received(early)

    def send_400_response(self, msg: str) -> None:
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:  # the answer has begun, or must have no text, as to HEAD
            self.transport.abort()
        if self._is_answering():  # to the header; its body is none, and nothing more may be said
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def shutdown(self) -> None:
        if self.conn.our_state is h11.ERROR:
            self.transport.abort()
        else:
            super().shutdown()

    def waits_for(self) -> str | None:
        """What the client has to do now; None: the server computes."""
        if self.transport.get_write_buffer_size():
            return "write"
        if self._is_answering():
            return "body" if self.conn.their_state is h11.SEND_BODY else None
        return "drain" if self.conn.their_state is h11.SEND_BODY else "header"

    def waiting_since(self, now: float) -> float:
        """When that began, as of `time.monotonic`, as exact as the calls of this are frequent."""
        wait = (self.waits_for(), self._num_requests)
        if wait != self._wait:
            self._wait, self._wait_began = wait, now
        return self._wait_began

    def end_if_late(self, now: float) -> None:
        """Close it if the client has had its time."""
        waited, kind = now - self.waiting_since(now), self._wait[0]
        if kind is None or waited < LIMITS_S[kind]:
            return
        has_begun = kind == "header" and self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]
        if has_begun and not self.transport.is_closing():
            self.transport.write(TOO_LATE)
            self.transport.close()
        else:
            self.transport.abort()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete


def make_room(connections: Collection[Any]) -> None:
    """Close the connections whose clients have let the server wait longest; those that send a body, and those whose
    header cannot be here yet, only as the last.

    One in sixteen beside those that are too many, so that looking for them does not become the work of whoever opens
    many.
    """
    now = time.monotonic()
    there = [one for one in connections if not one.transport.is_closing()]
    waits = []
    for one in there:
        if kind := one.waits_for():
            since = one.waiting_since(now)
            order = 2 if now - since < _FRESH_S else 1 if kind == "body" else 0
            waits.append((order, since, id(one), one))
    count = max(1, len(there) // 16 + max(0, len(there) - limits.MAX_CONNECTIONS))
    for *_, one in heapq.nsmallest(count, waits):
        one.transport.abort()


def sweep(connections: Iterable[Any]) -> None:
    """Close those whose clients have had their time."""
    now = time.monotonic()
    for connection in list(connections):
        connection.end_if_late(now)
