"""Conversations of both protocols as chat templates take them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from pydantic import BaseModel

from kt_sft.chat import ChatBackend
from kt_sft.serving.errors import RequestError

ROLES = {"user": "user", "assistant": "assistant", "tool": "observation", "function": "observation"}


class Function(BaseModel):
    """Of a call: OpenAI sends the arguments as JSON text, Ollama as an object."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class Call(BaseModel):
    function: Function


class Part(BaseModel):
    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    role: str
    content: str | list[Part] | None = None
    images: list[Any] | None = None
    tool_calls: list[Call] | None = None


def conversation(messages: list[ChatMessage]) -> tuple[list[dict[str, str]], str | None]:
    """(messages, system prompt) in the roles of the templates, user's and model's in alternation.

    Raises:
        RequestError: an order of roles that templates do not know, or more than text.
    """
    system: list[str] = []
    turns: list[dict[str, str]] = []
    for at, message in enumerate(messages):
        where = f"messages.{at}"
        text = _text(message, where)
        if message.role in ("system", "developer"):
            if turns:
                raise RequestError(400, f"{where}: system messages come first", param="messages")
            system.append(text)
            continue
        if message.role not in ROLES:
            raise RequestError(400, f"{where}.role: expected {_known()}, found {message.role!r}", param="messages")
        role = ROLES[message.role]
        if message.tool_calls:
            if text.strip():
                reason = "templates take either content or tool_calls; leave one of them out"
                raise RequestError(400, f"{where}: {reason}", param="messages")
            role, text = "function", json.dumps([_call(call) for call in message.tool_calls], ensure_ascii=False)
        if role == "observation" and turns and turns[-1]["role"] == role:  # results of calls made at once
            turns[-1]["content"] += f"\n{text}"
            continue
        is_answer = role in ("assistant", "function")
        if is_answer != bool(len(turns) % 2):
            expected = "assistant" if len(turns) % 2 else "user or tool"
            raise RequestError(400, f"{where}.role: expected {expected}, found {message.role!r}", param="messages")
        turns.append({"role": role, "content": text})
    if len(turns) % 2 == 0:
        raise RequestError(400, "messages: expected a last one from user or tool", param="messages")
    return turns, "\n\n".join(system) if system else None


async def encode(backend: ChatBackend, messages: list[ChatMessage], tools: list[dict[str, Any]]) -> list[int]:
    """Prompt of a conversation in which the model may call these functions.

    Raises:
        RequestError: see `conversation`; or the template wants more of a function than is there.
    """
    turns, system = conversation(messages)
    text = json.dumps(tools, ensure_ascii=False) if tools else None
    try:
        return await asyncio.to_thread(backend.encode_chat, turns, system, text)
    except (KeyError, TypeError, AttributeError) as error:
        if not tools:
            raise
        message = f"tools: expected name, description and parameters of each function, found a fault: {error}"
        raise RequestError(400, message, param="tools") from None


def _text(message: ChatMessage, where: str) -> str:
    if message.images or (
        isinstance(message.content, list) and any(part.type not in ("text", "input_text") for part in message.content)
    ):
        raise RequestError(400, f"{where}.content: this server takes text only", param="messages")
    if isinstance(message.content, list):
        return "".join(part.text or "" for part in message.content)
    if message.content is None and not message.tool_calls:
        raise RequestError(400, f"{where}.content: missing", param="messages")
    return message.content or ""


def _call(call: Call) -> dict[str, Any]:
    arguments = call.function.arguments
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"name": call.function.name, "arguments": text}


def _known() -> str:
    return ", ".join(["system", "developer", *ROLES])
