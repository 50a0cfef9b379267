"""What a client is told when its request cannot be answered."""

from __future__ import annotations

MAX_MESSAGE_CHARS = 500  # messages quote what came, which may be megabytes


class RequestError(Exception):
    """A request that gets an error for its answer.

    Args:
        status: of HTTP.
        message: one sentence: what, expected, found; cut where it quotes too much.
        param: field of the request that is wrong.
        code: word for programs, as OpenAI's `context_length_exceeded`.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        self.message = message if len(message) <= MAX_MESSAGE_CHARS else f"{message[:MAX_MESSAGE_CHARS]} ..."
        super().__init__(self.message)
        self.status, self.param, self.code = status, param and param[:MAX_MESSAGE_CHARS], code

    @property
    def kind(self) -> str:
        """`type` of OpenAI's error object."""
        kinds = {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            503: "overloaded_error",
            504: "timeout_error",
        }
        return kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")


def unknown_model(name: str, known: list[str]) -> RequestError:
    """For a name that is not served."""
    message = f"model {name[:100]!r} not found; this server has: {', '.join(known)}"
    return RequestError(404, message, param="model", code="model_not_found")
