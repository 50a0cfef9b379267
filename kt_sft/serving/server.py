"""The server as a process: a socket taken early, signals, an end within seconds."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from types import FrameType

import uvicorn

from kt_sft.errors import ConfigError
from kt_sft.serving import connection, limits
from kt_sft.serving.access import Hosts
from kt_sft.serving.app import create_app
from kt_sft.serving.engine import Engine

logger = logging.getLogger(__name__)
GRACE_S = 5.0  # for answers that are being written, and then for the token that is being computed


def bind(host: str, port: int) -> socket.socket:
    """Take an address, so that one in use is known before a model is loaded; port 0 takes a free one.

    Raises:
        ConfigError: it cannot be had.
    """
    if not host:
        raise ConfigError("--host: expected an address, found an empty one; write 0.0.0.0 for every address")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay of 40 ms off where the protocol is named, not where it is 0.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.set_inheritable(True)
    except (OSError, OverflowError) as error:
        sock.close()
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({error}); choose others") from None
    return sock


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"--host {host} --port {port}"


class Server(uvicorn.Server):
    """Ends on the first signal without waiting for answers: they would take minutes.

    Args:
        sock: of `bind`.
        api_key: that requests have to bring; None: nobody is asked.
        allowed_hosts: names by which clients address it, beside those that are known.

    Raises:
        ConfigError: another server that was loading, too, listens there by now.
    """

    def __init__(
        self,
        engine: Engine,
        sock: socket.socket,
        *,
        api_key: str | None = None,
        allowed_hosts: Iterable[str] = (),
        log_level: str = "info",
    ):
        hosts = Hosts.of(sock.getsockname()[0], allowed_hosts)
        config = uvicorn.Config(
            create_app(engine, api_key=api_key, hosts=hosts),
            http=connection.Connection,
            ws="none",
            log_level=log_level,
            # More are open for a moment, until some are closed for the new ones, or where none can be.
            limit_concurrency=limits.MAX_CONNECTIONS * 4,
            h11_max_incomplete_event_size=limits.MAX_HEADER_BYTES,
            timeout_keep_alive=limits.KEEP_ALIVE_S,
            timeout_graceful_shutdown=round(GRACE_S),
            server_header=False,
        )
        super().__init__(config)
        self._engine, self._sock = engine, sock
        try:
            sock.listen(config.backlog)
        except OSError as error:
            raise ConfigError(f"{_address(sock)}: cannot listen there any more ({error}); choose another") from None

    def serve_until_stopped(self) -> bool:
        """Answer requests until a signal comes or `stop` is called.

        Returns:
            Whether no computation goes on; one may where a token takes long.
        """
        try:
            super().run(sockets=[self._sock])
        finally:
            self._sock.close()
            self._engine.close()
        return self._engine.join(GRACE_S)

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # of 0.1 s
            connection.sweep(self.server_state.connections)
        return await super().on_tick(counter)

    def stop(self) -> None:
        """End it, from any thread."""
        self.should_exit = True
        threading.Thread(target=self._engine.close).start()  # a signal handler may have interrupted what it locks

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        logger.info("stopping on %s", signal.Signals(sig).name)
        self.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, which would raise the signal again afterwards: a stop on request is no failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {sig: signal.signal(sig, self.handle_exit) for sig in signals}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)
