"""Conversations of both protocols as chat templates take them."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from starlette.requests import Request

from kt_sft.inference.backend import ChatBackend, PromptError
from kt_sft.serving.errors import RequestError
from kt_sft.serving.fields import Items, Strict
from kt_sft.serving.intake import Intake

ROLES = {"user": "user", "assistant": "assistant", "tool": "observation", "function": "observation"}


class Function(Strict):
    """Of a call: OpenAI sends the arguments as JSON text, Ollama as an object."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class Call(Strict):
    function: Function


class Part(Strict):
    type: str
    text: str | None = None


class ChatMessage(Strict):
    role: str
    content: str | Items[Part] | None = None
    images: Items[Any] | None = None
    tool_calls: Items[Call] | None = None


def conversation(messages: list[ChatMessage]) -> tuple[list[dict[str, str]], str | None]:
    """(messages, system prompt) in the roles of the templates, user's and model's in alternation.

    Raises:
        RequestError: an order of roles that templates do not know, or more than text.
    """
    system: list[str] = []
    turns: list[tuple[str, list[str]]] = []  # role, and texts of which tools gave several
    for at, message in enumerate(messages):
        where = f"messages.{at}"
        text = _text(message, where)
        if message.role in ("system", "developer"):
            if turns:
                raise RequestError(400, f"{where}: system messages come first", param="messages")
            system.append(text)
            continue
        if message.role not in ROLES:
            found = message.role[:100]
            raise RequestError(400, f"{where}.role: expected {_known()}, found {found!r}", param="messages")
        role = ROLES[message.role]
        if message.tool_calls:
            if text.strip():
                reason = "templates take either content or tool_calls; leave one of them out"
                raise RequestError(400, f"{where}: {reason}", param="messages")
            role, text = "function", json.dumps([_call(call) for call in message.tool_calls], ensure_ascii=False)
        if role == "observation" and turns and turns[-1][0] == role:  # results of calls made at once
            turns[-1][1].append(text)
            continue
        is_answer = role in ("assistant", "function")
        if is_answer != bool(len(turns) % 2):
            expected = "assistant" if len(turns) % 2 else "user or tool"
            raise RequestError(400, f"{where}.role: expected {expected}, found {message.role!r}", param="messages")
        turns.append((role, [text]))
    if len(turns) % 2 == 0:
        raise RequestError(400, "messages: expected a last one from user or tool", param="messages")
    joined = [{"role": role, "content": "\n".join(texts)} for role, texts in turns]
    return joined, "\n\n".join(system) if system else None


async def encode(
    intake: Intake, request: Request, backend: ChatBackend, messages: list[ChatMessage], tools: list[dict[str, Any]]
) -> list[int]:
    """Prompt of a conversation in which the model may call these functions.

    Raises:
        RequestError: see `conversation` and `Intake.tokens`; or the template wants more of a function than is there.
    """
    turns, system = conversation(messages)
    text = json.dumps(tools, ensure_ascii=False) if tools else None
    texts = [turn["content"] for turn in turns] + [one for one in (system, text) if one]
    has_calls = tools or any(turn["role"] == "function" for turn in turns)
    encode_chat = partial(_encode_calls, backend) if has_calls else backend.encode_chat
    return await intake.tokens(request, texts, partial(encode_chat, turns, system, text), param="messages")


def _encode_calls(
    backend: ChatBackend, turns: list[dict[str, str]], system: str | None, tools: str | None
) -> list[int]:
    """`encode_chat` where functions are described or were called: templates read those, and fall over some."""
    try:
        return backend.encode_chat(turns, system, tools)
    except PromptError:
        raise
    except Exception as error:
        expected = "name, description and parameters of each function, and calls with arguments in JSON"
        message = f"expected {expected}; found a fault: {type(error).__name__}: {error}"
        raise RequestError(400, f"tools: {message}", param="tools") from None


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
