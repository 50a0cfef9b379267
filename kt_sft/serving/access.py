"""Who may ask: the key, and where there is none, only programs that address this server and no web pages.

Without a key every page in a browser on this machine reaches a loopback server. Three things keep pages out: the name
in `Host` (a page of another name that has been bound to this address, DNS rebinding), `Origin` (any page), and a
content type that pages cannot send without asking first, which nobody here answers.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response

from kt_sft.errors import ConfigError
from kt_sft.serving.errors import RequestError
from kt_sft.serving.limits import MAX_BODY_BYTES, MAX_HEADER_BYTES

BAD_FRAMING = "bad_framing"  # what follows on such a connection may be meant as anything
OPEN_PATHS = ("/health",)  # asked for by programs that watch servers and hold no keys
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+?)\.?(?::[0-9]{1,5})?")


def key_bytes(key: str, origin: str) -> bytes:
    """A key as headers bring it.

    Args:
        origin: where it was given, for the message.

    Raises:
        ConfigError: empty, or with characters that clients cannot send or cut off.
    """
    if not key or any(letter.isspace() or not letter.isprintable() for letter in key):
        found = "spaces or characters that cannot be printed" if key.strip() else "an empty one"
        raise ConfigError(
            f"{origin}: expected a key of visible characters, found {found}; "
            "take one as of `openssl rand -hex 32`, or leave the option and the variable out to ask for none"
        )
    return key.encode()  # headers are bytes, read as latin-1


@dataclass(frozen=True)
class Hosts:
    """Names by which a server without a key may be addressed.

    Args:
        addresses: also any IP address, not only those of this machine's own loopback.
    """

    names: frozenset[str]
    addresses: bool = False

    @classmethod
    def of(cls, bound: str, more: Iterable[str] = ()) -> Hosts:
        """Of a server that is bound to an address, and known by more names.

        Raises:
            ConfigError: one of them is no name of a host.
        """
        for name in more:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise ConfigError(f"--allowed-host: expected a name as gpu.example.org, without a port, found {name!r}")
        is_local = ipaddress.ip_address(bound.partition("%")[0]).is_loopback
        own = () if is_local else (socket.gethostname(),)
        return cls(frozenset(name.lower().rstrip(".") for name in ("localhost", *own, *more)), not is_local)

    def allow(self, header: str) -> bool:
        """Whether `Host` is one of them, with any port."""
        found = _HOST.fullmatch(header)
        if found is None:
            return False
        name = found["name"].lower()
        if name in self.names or name.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return address.is_loopback or self.addresses


class Gate:
    """ASGI middleware: refuses before anything of a request is read but its header.

    Args:
        key: that requests have to bring as `Authorization: Bearer KEY`; None: who may ask is told by `hosts`.
        answer: (path, error) to a response in the protocol of the path.
    """

    def __init__(
        self, app: Any, *, key: bytes | None, hosts: Hosts, answer: Callable[[str, RequestError], Response]
    ) -> None:
        self._app, self._key, self._hosts, self._answer = app, key, hosts, answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        app = self._app
        if scope["type"] == "http":
            try:
                self._check(scope, Headers(scope=scope))
            except RequestError as error:
                app = self._answer(scope["path"], error)
                if error.code == BAD_FRAMING:
                    app.headers["Connection"] = "close"
        await app(scope, receive, send)

    def _check(self, scope: Any, headers: Headers) -> None:
        _check_framing(scope, headers)
        if self._key is None:
            self._check_sender(headers)
        elif scope["path"] not in OPEN_PATHS:
            self._check_key(headers)

    def _check_key(self, headers: Headers) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode("latin-1"), self._key or b""):
            message = "expected `Authorization: Bearer KEY` with this server's key"
            raise RequestError(401, message, code="invalid_api_key")

    def _check_sender(self, headers: Headers) -> None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if not all(self._hosts.allow(host) for host in hosts):  # HTTP/1.0 need not name one; browsers do
            message = (
                f"host: {hosts[0]!r} is no name of this server; start it with --allowed-host NAME or with an --api-key"
            )
            raise RequestError(403, message, code="wrong_host")
        if any(origin.lower() not in {f"http://{host.lower()}" for host in hosts} for origin in origins):
            message = f"origin: {origins[0]!r}; pages of other servers may not ask this one; start it with an --api-key"
            raise RequestError(403, message, code="wrong_origin")
        if "transfer-encoding" in headers or headers.get("content-length", "0").strip("0"):
            types = [value.partition(";")[0].strip().lower() for value in headers.getlist("content-type")]
            if types != ["application/json"]:
                message = "content-type: expected application/json with a body"
                raise RequestError(415, message, code="unsupported_media_type")


def _check_framing(scope: Any, headers: Headers) -> None:
    """Raise where two servers could see different ends of the body, and where header or body are too long."""
    if scope["http_version"] not in ("1.0", "1.1"):
        raise RequestError(505, "expected HTTP/1.1", code=BAD_FRAMING)
    # h11 has its own limit, but not for a header that comes in one piece.
    target = len(scope["raw_path"]) + len(scope["query_string"])
    if target + sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > MAX_HEADER_BYTES:
        raise RequestError(431, f"the header has more than {MAX_HEADER_BYTES >> 10} KiB, the limit of this server")
    if "transfer-encoding" in headers and ("content-length" in headers or scope["http_version"] == "1.0"):
        message = "transfer-encoding: expected no content-length beside it, and HTTP/1.1"
        raise RequestError(400, message, code=BAD_FRAMING)
    if int(headers.get("content-length", 0)) > MAX_BODY_BYTES:  # h11 has checked that these are digits
        raise too_long()


def too_long() -> RequestError:
    """For a body beyond the limit."""
    return RequestError(413, f"the body has more than {MAX_BODY_BYTES >> 20} MiB, the limit of this server")
