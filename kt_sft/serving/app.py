"""The application: both protocols, one key, errors in each protocol's own shape."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from kt_sft import __version__
from kt_sft.serving import ollama_routes, openai_routes
from kt_sft.serving.access import Gate, Hosts, key_bytes
from kt_sft.serving.engine import Cancelled, Engine
from kt_sft.serving.errors import RequestError
from kt_sft.serving.intake import Intake


def create_app(engine: Engine, *, api_key: str | None = None, hosts: Hosts | None = None) -> FastAPI:
    """The server of one engine.

    Args:
        api_key: that requests have to bring as `Authorization: Bearer KEY`; None: nobody is asked.
        hosts: names in `Host` that are answered where there is no key; default: those of a loopback server.

    Raises:
        ConfigError: a key that clients cannot send.
    """
    key = None if api_key is None else key_bytes(api_key, "the key")
    app = FastAPI(title="kt_sft", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        active, waiting = engine.counts()
        return {"status": "ok", "model": engine.backend.facts.name, "active": active, "waiting": waiting}

    intake = Intake(engine)
    app.include_router(openai_routes.router(engine, intake))
    app.include_router(ollama_routes.router(engine, intake))
    app.add_middleware(Gate, key=key, hosts=hosts or Hosts.of("127.0.0.1"), answer=_error_response)
    app.add_exception_handler(RequestError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Cancelled, _answer_cancelled)
    app.add_exception_handler(Exception, _answer_fault)
    return app


def _error_response(path: str, error: RequestError) -> JSONResponse:
    shape = ollama_routes if path.startswith("/api/") else openai_routes
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(shape.error_body(error), status_code=error.status, headers=headers)


async def _answer_error(request: Request, error: RequestError) -> JSONResponse:
    return _error_response(request.scope["path"], error)


async def _answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
    path = request.scope["path"]
    response = _error_response(path, RequestError(error.status_code, f"{request.method} {path}: {error.detail}"))
    response.headers.update(error.headers or {})  # the methods that there are
    return response


async def _answer_cancelled(request: Request, _error: Exception) -> JSONResponse:
    return await _answer_error(request, RequestError(503, "the request was cancelled", code="cancelled"))


async def _answer_fault(request: Request, error: Exception) -> JSONResponse:
    """The server logs it: Starlette raises it again after this."""
    return await _answer_error(request, RequestError(500, f"internal error: {type(error).__name__}"))
