"""Ollama's routes: tags, show, ps, version, generate, chat."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, PlainTextResponse, Response

from kt_sft import __version__
from kt_sft.inference.backend import ModelFacts, Sampling, ToolCall
from kt_sft.serving.engine import Engine, Generation
from kt_sft.serving.errors import RequestError, unknown_model
from kt_sft.serving.fields import Items, Penalty, Repetition, Seed, Share, Strict, Whole
from kt_sft.serving.http import EventStream, or_disconnect
from kt_sft.serving.intake import Intake
from kt_sft.serving.messages import ChatMessage, encode
from kt_sft.serving.sampling import room_for_answer, stop_strings, top_k, uses_adapter

NDJSON = "application/x-ndjson"
Shape = Callable[[str, list[ToolCall]], dict[str, Any]]  # text and calls -> the fields that carry them


class Options(Strict):
    """Those of Ollama's options that this server follows; like Ollama it passes over names that it does not know."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Share | None = None
    top_k: Annotated[Whole, Field(ge=-1)] | None = None
    repeat_penalty: Repetition | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None  # negative: a random one
    stop: str | Items[str] | None = None
    num_predict: Annotated[Whole, Field(ge=-2)] | None = None  # negative: as much as fits


class Body(Strict):
    model: str
    stream: bool | None = True
    options: Options | None = None
    format: Any = None


class GenerateBody(Body):
    prompt: str = ""
    system: str | None = None
    raw: bool | None = False
    images: Items[Any] | None = None
    suffix: str | None = None
    template: str | None = None


class ChatBody(Body):
    messages: Items[ChatMessage] = []
    tools: Items[dict[str, Any]] | None = None


class ShowBody(Strict):
    model: str | None = None
    name: str | None = None  # of older clients


def error_body(error: RequestError) -> dict[str, Any]:
    """Ollama's errors are a sentence."""
    return {"error": error.message}


def router(engine: Engine, intake: Intake) -> APIRouter:
    """The routes, answered by this engine."""
    routes = APIRouter()
    facts = engine.backend.facts

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def say_hello() -> Response:
        return PlainTextResponse("Ollama is running")  # clients look for these words

    @routes.get("/api/version")
    async def version() -> dict[str, Any]:
        return {"version": __version__}

    @routes.get("/api/tags")
    async def tags() -> dict[str, Any]:
        return {"models": [_card(facts, name) for name in facts.names]}

    @routes.get("/api/ps")
    async def running() -> dict[str, Any]:
        more = {"expires_at": "9999-12-31T23:59:59Z", "size_vram": 0, "context_length": facts.context_length}
        return {"models": [{**_card(facts, name), **more} for name in facts.names]}

    @routes.post("/api/show")
    async def show(request: Request) -> dict[str, Any]:
        async with intake.body(request, ShowBody) as body:
            _local_name(facts, body.model or body.name or "")
        return _description(facts)

    @routes.post("/api/generate")
    async def generate(request: Request) -> Response:
        async with intake.body(request, GenerateBody) as body:
            _refuse(body, "format", "images", "suffix", "template")
            if not body.prompt:
                return _loaded(facts, body, {"response": ""})
            if body.raw:
                texts, encode_prompt = [body.prompt], partial(engine.backend.encode_text, body.prompt)
            else:
                texts = [body.prompt, body.system or ""]
                turns = [{"role": "user", "content": body.prompt}]
                encode_prompt = partial(engine.backend.encode_chat, turns, body.system or None, None)
            prompt = await intake.tokens(request, texts, encode_prompt, param="prompt")
            generation = _submit(engine, body, prompt, continues_text=bool(body.raw))
        return await _answer(engine, request, body, generation, _response)

    @routes.post("/api/chat")
    async def chat(request: Request) -> Response:
        async with intake.body(request, ChatBody) as body:
            _refuse(body, "format")
            if not body.messages:
                return _loaded(facts, body, _message("", []))
            tools = [tool.get("function", tool) for tool in body.tools or []]
            prompt = await encode(intake, request, engine.backend, body.messages, tools)
            generation = _submit(engine, body, prompt)
        return await _answer(engine, request, body, generation, _message, has_tools=bool(tools))

    return routes


def _submit(engine: Engine, body: Body, prompt: list[int], *, continues_text: bool = False) -> Generation:
    return engine.submit(prompt, _sampling(engine.backend.facts, body, prompt), continues_text=continues_text)


async def _answer(
    engine: Engine, request: Request, body: Body, generation: Generation, shape: Shape, *, has_tools: bool = False
) -> Response:
    lines = _lines(engine, generation, body.model, shape, has_tools=has_tools)
    if body.stream is not False:
        alive = json.dumps({"model": body.model, "created_at": _now(), **shape("", []), "done": False}) + "\n"
        return EventStream(_as_text(lines), NDJSON, close=generation.cancel, alive=alive)
    return await or_disconnect(
        request, _whole(engine, generation, body.model, shape, has_tools), close=generation.cancel
    )


async def _lines(
    engine: Engine, generation: Generation, model: str, shape: Shape, *, has_tools: bool
) -> AsyncIterator[dict[str, Any]]:
    """Objects of a stream; an answer that may be a call of tools comes in one."""
    whole = ""
    async for piece in generation:
        if has_tools:
            whole += piece
        else:
            yield {"model": model, "created_at": _now(), **shape(piece, []), "done": False}
    if whole:
        yield {"model": model, "created_at": _now(), **_text_or_calls(engine, whole, shape), "done": False}
    yield {"model": model, "created_at": _now(), **shape("", []), **_summary(generation)}


async def _as_text(lines: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for line in lines:
            yield json.dumps(line) + "\n"
    except RequestError as error:
        yield json.dumps(error_body(error)) + "\n"


async def _whole(engine: Engine, generation: Generation, model: str, shape: Shape, has_tools: bool) -> Response:
    text = await generation.text()
    fields = _text_or_calls(engine, text, shape) if has_tools else shape(text, [])
    return JSONResponse({"model": model, "created_at": _now(), **fields, **_summary(generation)})


def _text_or_calls(engine: Engine, text: str, shape: Shape) -> dict[str, Any]:
    calls = engine.backend.tool_calls(text)
    return shape("", calls) if calls else shape(text, [])


def _response(text: str, _calls: list[ToolCall]) -> dict[str, Any]:
    return {"response": text}


def _message(text: str, calls: list[ToolCall]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {"function": {"name": call.name, "arguments": _arguments(call.arguments)}} for call in calls
        ]
    return {"message": message}


def _arguments(text: str) -> dict[str, Any]:
    """Ollama's arguments are an object."""
    try:
        value = json.loads(text)
    except ValueError:
        return {"arguments": text}
    return value if isinstance(value, dict) else {"arguments": value}


def _summary(generation: Generation) -> dict[str, Any]:
    """The last object's counts and nanoseconds."""
    timing = generation.timing
    end = timing.ended or timing.arrived
    start = timing.started or end
    first = timing.first_token or end
    return {
        "done": True,
        "done_reason": generation.finish_reason,
        "total_duration": _ns(end - timing.arrived),
        "load_duration": _ns(start - timing.arrived),  # of this server: the time in the queue
        "prompt_eval_count": len(generation.prompt_ids),
        "prompt_eval_duration": _ns(first - start),
        "eval_count": generation.completion_tokens,
        "eval_duration": _ns(end - first),
    }


def _sampling(facts: ModelFacts, body: Body, prompt: list[int]) -> Sampling:
    options = body.options or Options()
    adapter = uses_adapter(facts, _local_name(facts, body.model))
    asked = options.num_predict
    fills = asked is not None and asked < 0
    return Sampling(
        max_tokens=room_for_answer(facts, prompt, facts.context_length if fills else asked or None, cuts=True),
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=top_k(options.top_k),
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty or 0.0,
        frequency_penalty=options.frequency_penalty or 0.0,
        seed=None if options.seed is None or options.seed < 0 else options.seed,
        stop=stop_strings(options.stop),
        adapter=adapter,
    )


def _local_name(facts: ModelFacts, name: str) -> str:
    """The served name that Ollama's `name` or `name:latest` means."""
    plain = name if name in facts.names else name.removesuffix(":latest")
    if plain not in facts.names:
        raise unknown_model(name, facts.names)
    return plain


def _refuse(body: Body, *fields: str) -> None:
    for field in fields:
        if getattr(body, field):
            raise RequestError(400, f"{field}: not supported by this server; leave it out", param=field)


def _loaded(facts: ModelFacts, body: Body, fields: dict[str, Any]) -> Response:
    """The answer to a request without a prompt, by which clients ask for a model to be loaded."""
    _local_name(facts, body.model)
    return JSONResponse({"model": body.model, "created_at": _now(), **fields, "done": True, "done_reason": "load"})


def _card(facts: ModelFacts, name: str) -> dict[str, Any]:
    changed = datetime.fromtimestamp(facts.created, UTC).isoformat()
    card = {"name": name, "model": name, "modified_at": changed, "size": facts.size_bytes, "digest": facts.digest}
    return {**card, "details": _details(facts)}


def _details(facts: ModelFacts) -> dict[str, Any]:
    return {
        "parent_model": facts.base_name or "",
        "format": "safetensors",
        "family": facts.family,
        "families": [facts.family],
        "parameter_size": _short(facts.num_parameters),
        "quantization_level": facts.weight_format,
    }


def _description(facts: ModelFacts) -> dict[str, Any]:
    return {
        "modified_at": datetime.fromtimestamp(facts.created, UTC).isoformat(),
        "details": _details(facts),
        "model_info": {
            "general.architecture": facts.family,
            "general.parameter_count": facts.num_parameters,
            f"{facts.family}.context_length": facts.context_length,
        },
        "parameters": f"num_predict {facts.default_max_tokens}",
        "capabilities": ["completion", "tools"],
    }


def _short(count: int) -> str:
    """213.9M, 30.5B."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _ns(seconds: float) -> int:
    return max(0, int(seconds * 1e9))
