"""The server as a process: a socket taken early, signals, an end within seconds."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn

from kt_sft.errors import ConfigError
from kt_sft.serving.app import create_app
from kt_sft.serving.engine import Engine

logger = logging.getLogger(__name__)
GRACE_S = 5.0  # for answers that are being written, and then for the token that is being computed
MAX_CONNECTIONS = 512  # open at a time; further ones get 503


def bind(host: str, port: int) -> socket.socket:
    """Take an address, so that one in use is known before a model is loaded; port 0 takes a free one.

    Raises:
        ConfigError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
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

    Raises:
        ConfigError: another server that was loading, too, listens there by now.
    """

    def __init__(self, engine: Engine, sock: socket.socket, *, api_key: str | None = None, log_level: str = "info"):
        config = uvicorn.Config(
            create_app(engine, api_key=api_key),
            log_level=log_level,
            limit_concurrency=MAX_CONNECTIONS,
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
