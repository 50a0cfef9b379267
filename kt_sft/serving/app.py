"""The application: both protocols, one key, errors in each protocol's own shape."""

from __future__ import annotations

import hmac
from typing import Any

from fastapi import Depends, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from kt_sft import __version__
from kt_sft.serving import ollama_routes, openai_routes
from kt_sft.serving.engine import Cancelled, Engine
from kt_sft.serving.errors import RequestError


def create_app(engine: Engine, *, api_key: str | None = None) -> FastAPI:
    """The server of one engine.

    Args:
        api_key: that requests have to bring as `Authorization: Bearer KEY`; None: nobody is asked.
    """

    key = None if api_key is None else api_key.encode("utf-8", "surrogateescape")  # headers are bytes, read as latin-1

    async def check_key(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if key is None or (scheme.lower() == "bearer" and hmac.compare_digest(given.encode("latin-1"), key)):
            return
        raise RequestError(401, "expected `Authorization: Bearer KEY` with this server's key", code="invalid_api_key")

    app = FastAPI(title="kt_sft", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        active, waiting = engine.counts()
        return {"status": "ok", "model": engine.backend.facts.name, "active": active, "waiting": waiting}

    app.include_router(openai_routes.router(engine), dependencies=[Depends(check_key)])
    app.include_router(ollama_routes.router(engine), dependencies=[Depends(check_key)])
    app.add_exception_handler(RequestError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Cancelled, _answer_cancelled)
    app.add_exception_handler(Exception, _answer_fault)
    return app


async def _answer_error(request: Request, error: RequestError) -> JSONResponse:
    shape = ollama_routes if request.url.path.startswith("/api/") else openai_routes
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(shape.error_body(error), status_code=error.status, headers=headers)


async def _answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _answer_error(request, RequestError(error.status_code, message))


async def _answer_cancelled(request: Request, _error: Exception) -> JSONResponse:
    return await _answer_error(request, RequestError(503, "the request was cancelled", code="cancelled"))


async def _answer_fault(request: Request, error: Exception) -> JSONResponse:
    """The server logs it: Starlette raises it again after this."""
    return await _answer_error(request, RequestError(500, f"internal error: {type(error).__name__}"))
