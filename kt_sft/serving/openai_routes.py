"""OpenAI's routes: models, chat completions, completions."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from kt_sft.inference.backend import Sampling, ToolCall
from kt_sft.serving.engine import Cancelled, Engine, Generation
from kt_sft.serving.errors import RequestError, unknown_model
from kt_sft.serving.http import EventStream, or_disconnect
from kt_sft.serving.intake import Intake
from kt_sft.serving.messages import encode
from kt_sft.serving.openai_schema import ChatRequest, CompletionRequest
from kt_sft.serving.openai_schema import Request as Body
from kt_sft.serving.sampling import room_for_answer, stop_strings, top_k, uses_adapter

MAX_PROMPTS = 64
DONE = "data: [DONE]\n\n"
STILL_ALIVE = ": still computing\n\n"


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


@dataclass(frozen=True)
class Reply:
    """The parts that all objects of one answer share, and how choices are spelt."""

    id: str
    object: str
    created: int
    model: str
    body: Body

    @classmethod
    def to(cls, body: Body, prefix: str, name: str) -> Reply:
        return cls(f"{prefix}-{uuid.uuid4().hex}", name, int(time.time()), body.model, body)

    def envelope(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One object of the protocol."""
        shared = {"id": self.id, "object": self.object, "created": self.created, "model": self.model}
        return {**shared, "system_fingerprint": None, "choices": choices, **more}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        """One event of a stream."""
        usage = {"usage": None} if self.body.includes_usage else {}
        return f"data: {json.dumps(self.envelope(choices, **usage, **more))}\n\n"


def router(engine: Engine, intake: Intake) -> APIRouter:
    """The routes, answered by this engine."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(engine, name) for name in engine.backend.facts.names]}

    @routes.get("/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        facts = engine.backend.facts
        if name not in facts.names:
            raise unknown_model(name, facts.names)
        return _card(engine, name)

    @routes.post("/chat/completions")
    async def chat(request: Request) -> Response:
        async with intake.body(request, ChatRequest) as body:
            body.refuse_unsupported()
            adapter = uses_adapter(engine.backend.facts, body.model)
            tools = [tool.function for tool in body.tools or []] if body.tool_choice != "none" else []
            wants_tools = bool(tools)
            prompt = await encode(intake, request, engine.backend, body.messages, tools)
            generations = _submit(engine, body, [prompt], adapter)
        close = partial(_cancel, generations)
        if body.stream:
            reply = Reply.to(body, "chatcmpl", "chat.completion.chunk")
            pieces = _stream_chat(engine, generations, reply, wants_tools)
            return EventStream(pieces, "text/event-stream", close=close, alive=STILL_ALIVE)
        reply = Reply.to(body, "chatcmpl", "chat.completion")
        return await or_disconnect(request, _answer_chat(engine, generations, reply, wants_tools), close=close)

    @routes.post("/completions")
    async def complete(request: Request) -> Response:
        async with intake.body(request, CompletionRequest) as body:
            body.refuse_unsupported()
            adapter = uses_adapter(engine.backend.facts, body.model)
            prompts = await _prompts(engine, intake, request, body.prompt)
            generations = _submit(engine, body, prompts, adapter, continues_text=True)
        close = partial(_cancel, generations)
        reply = Reply.to(body, "cmpl", "text_completion")
        if body.stream:
            pieces = _stream_text(generations, reply)
            return EventStream(pieces, "text/event-stream", close=close, alive=STILL_ALIVE)
        return await or_disconnect(request, _answer_text(generations, reply), close=close)

    return routes


def _card(engine: Engine, name: str) -> dict[str, Any]:
    facts = engine.backend.facts
    parent = facts.base_name if name == facts.name else None
    card = {"id": name, "object": "model", "created": int(facts.created), "owned_by": "kt_sft"}
    return {**card, "parent": parent, "max_model_len": facts.context_length}


async def _prompts(engine: Engine, intake: Intake, request: Request, prompt: str | list[Any]) -> list[list[int]]:
    """Token ids of each prompt."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not 1 <= len(prompt) <= MAX_PROMPTS:
        raise RequestError(400, f"prompt: expected 1 to {MAX_PROMPTS} prompts, found {len(prompt)}", param="prompt")
    encode_text = engine.backend.encode_text
    found = [
        await intake.tokens(request, [one], partial(encode_text, one), param="prompt") if isinstance(one, str) else one
        for one in prompt
    ]
    vocab = engine.backend.facts.vocab_size
    if not all(found) or any(not 0 <= min(ids) <= max(ids) < vocab for ids in found):
        raise RequestError(
            400, f"prompt: expected at least one token, and tokens from 0 to {vocab - 1}", param="prompt"
        )
    return found


def _submit(
    engine: Engine, body: Body, prompts: list[list[int]], adapter: bool, *, continues_text: bool = False
) -> list[Generation]:
    """Queue `n` generations for every prompt, or none."""
    stop = stop_strings(body.stop)
    count, most = len(prompts) * (body.n or 1), engine.capacity
    if count > most:
        param = "prompt" if len(prompts) > most else "n"
        message = f"{param}: expected at most {most} answers, all that this server takes at a time, found {count}"
        raise RequestError(400, message, param=param)
    limits = [room_for_answer(engine.backend.facts, prompt, body.limit, cuts=False) for prompt in prompts]
    generations: list[Generation] = []
    try:
        for prompt, max_tokens in zip(prompts, limits, strict=True):
            for i in range(body.n or 1):
                sampling = Sampling(
                    max_tokens=max_tokens,
                    temperature=body.temperature,
                    top_p=body.top_p,
                    top_k=top_k(body.top_k),
                    repetition_penalty=body.repetition_penalty,
                    presence_penalty=body.presence_penalty or 0.0,
                    frequency_penalty=body.frequency_penalty or 0.0,
                    seed=None if body.seed is None else (body.seed + i) % 2**63,
                    stop=stop,
                    ignore_eos=body.ignore_eos,
                    adapter=adapter,
                )
                generations.append(engine.submit(prompt, sampling, continues_text=continues_text))
    except RequestError:
        _cancel(generations)
        raise
    return generations


async def _answer_chat(engine: Engine, generations: list[Generation], reply: Reply, wants_tools: bool) -> JSONResponse:
    choices = []
    for i, text in enumerate(await _texts(generations)):
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        reason = generations[i].finish_reason
        if wants_tools and (calls := engine.backend.tool_calls(text)):
            message |= {"content": None, "tool_calls": [_call(call) for call in calls]}
            reason = "tool_calls"
        choices.append({"index": i, "message": message, "logprobs": None, "finish_reason": reason})
    return JSONResponse(reply.envelope(choices, usage=_usage(generations)))


async def _answer_text(generations: list[Generation], reply: Reply) -> JSONResponse:
    texts = await _texts(generations)
    choices = [
        {"index": i, "text": text, "logprobs": None, "finish_reason": generations[i].finish_reason}
        for i, text in enumerate(texts)
    ]
    return JSONResponse(reply.envelope(choices, usage=_usage(generations)))


async def _stream_chat(
    engine: Engine, generations: list[Generation], reply: Reply, wants_tools: bool
) -> AsyncIterator[str]:
    """Events; an answer that may be a call of tools is known only as a whole, and comes in one."""

    def event(index: int, delta: dict[str, Any], reason: str | None = None) -> str:
        return reply.chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}])

    whole = [""] * len(generations)
    try:
        for i in range(len(generations)):
            yield event(i, {"role": "assistant", "content": ""})
        async for i, piece in _merged(generations):
            if piece is not None and wants_tools:
                whole[i] += piece
            elif piece is not None:
                yield event(i, {"content": piece})
            elif wants_tools and (calls := engine.backend.tool_calls(whole[i])):
                yield event(i, {"tool_calls": [{"index": at, **_call(call)} for at, call in enumerate(calls)]})
                yield event(i, {}, "tool_calls")
            else:
                if whole[i]:
                    yield event(i, {"content": whole[i]})
                yield event(i, {}, generations[i].finish_reason)
        yield _last(generations, reply)
    except RequestError as error:
        yield f"data: {json.dumps(error_body(error))}\n\n"


async def _stream_text(generations: list[Generation], reply: Reply) -> AsyncIterator[str]:
    try:
        async for i, piece in _merged(generations):
            reason = generations[i].finish_reason if piece is None else None
            yield reply.chunk([{"index": i, "text": piece or "", "logprobs": None, "finish_reason": reason}])
        yield _last(generations, reply)
    except RequestError as error:
        yield f"data: {json.dumps(error_body(error))}\n\n"


def _last(generations: list[Generation], reply: Reply) -> str:
    if not reply.body.includes_usage:
        return DONE
    event = reply.envelope([], usage=_usage(generations))
    return f"data: {json.dumps(event)}\n\n{DONE}"


async def _texts(generations: list[Generation]) -> list[str]:
    return list(await asyncio.gather(*(generation.text() for generation in generations)))


async def _merged(generations: list[Generation]) -> AsyncIterator[tuple[int, str | None]]:
    """(index, piece) as they come; None ends one."""
    events: asyncio.Queue[tuple[int, str | Exception | None]] = asyncio.Queue()

    async def read(index: int, generation: Generation) -> None:
        try:
            async for piece in generation:
                events.put_nowait((index, piece))
            events.put_nowait((index, None))
        except (RequestError, Cancelled) as error:
            events.put_nowait((index, error))

    readers = [asyncio.ensure_future(read(i, generation)) for i, generation in enumerate(generations)]
    try:
        running = len(readers)
        while running:
            index, event = await events.get()
            if isinstance(event, Exception):
                raise event
            running -= event is None
            yield index, event
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


def _cancel(generations: list[Generation]) -> None:
    for generation in generations:
        generation.cancel()


def _usage(generations: list[Generation]) -> dict[str, int]:
    """Every prompt counts once, however many answers it has."""
    prompt = sum(len(ids) for ids in {id(g.prompt_ids): g.prompt_ids for g in generations}.values())
    completion = sum(generation.completion_tokens for generation in generations)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
