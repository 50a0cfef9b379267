"""JSON from strangers: UTF-8, without repeated names, of bounded depth and number of values.

The standard parser builds what it is given: 16 MiB of brackets become 400 MiB in two seconds during which no other
thread runs. So values are counted first, and only large bodies cost more than a glance.
"""

from __future__ import annotations

import json
import re
from typing import Any

from kt_sft.serving.errors import RequestError
from kt_sft.serving.limits import MAX_CONTAINERS, MAX_DEPTH, MAX_VALUES

# Possessive: one pass, no stack. One that never ends counts, too: else each quote in it would be tried as a beginning.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)


def read_object(body: bytes | bytearray) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        RequestError: 400, it is none, or one beyond the limits.
    """
    _check_size(body)
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise _not_json(f"expected UTF-8, found byte {body[error.start]:#04x} at {error.start}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise _not_json(str(error)) from None
    if not isinstance(value, dict):
        raise RequestError(400, f"the body: expected a JSON object, found {type(value).__name__}")
    _check_values(value, may_have_surrogates=b"\\u" in body)
    return value


def _check_size(body: bytes | bytearray) -> None:
    """Raise for more arrays and objects, or more values, than a request needs."""
    if body.count(b",") <= MAX_VALUES and body.count(b"[") + body.count(b"{") <= MAX_CONTAINERS:
        return
    commas = containers = at = 0
    while True:  # text may hold any number of them
        string = _STRING.search(body, at)
        end = string.start() if string else len(body)
        commas += body.count(b",", at, end)
        containers += body.count(b"[", at, end) + body.count(b"{", at, end)
        if commas > MAX_VALUES or containers > MAX_CONTAINERS:
            limits = f"{MAX_CONTAINERS} arrays and objects and {MAX_VALUES} values"
            raise RequestError(400, f"the body: expected at most {limits}; send less at a time", code="body_too_large")
        if string is None:
            return
        at = string.end()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {name[:100]!a} occurs twice in one object")
    return value


def _check_values(value: dict[str, Any], *, may_have_surrogates: bool) -> None:
    """Raise for too deep a nesting and for text that cannot be written as UTF-8."""
    level: list[Any] = [value]
    try:
        for _ in range(MAX_DEPTH):
            following: list[Any] = []
            for one in level:
                if isinstance(one, dict):
                    if may_have_surrogates:
                        "".join(one).encode()
                    one = one.values()
                for item in one:
                    if isinstance(item, (dict, list)):
                        following.append(item)
                    elif may_have_surrogates and isinstance(item, str):
                        item.encode()
            if not following:
                return
            level = following
    except UnicodeEncodeError:
        raise _not_json("half of a surrogate pair is no character") from None
    raise _too_deep()


def _too_deep() -> RequestError:
    return RequestError(400, f"the body: arrays and objects are nested deeper than {MAX_DEPTH}", code="invalid_json")


def _not_json(reason: str) -> RequestError:
    return RequestError(400, f"the body is not JSON: {reason}", code="invalid_json")
