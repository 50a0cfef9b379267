"""Bodies of OpenAI's requests, as far as this server follows them, and what it refuses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from kt_sft.serving.errors import RequestError
from kt_sft.serving.fields import Count, Items, Penalty, Repetition, Seed, Share, Strict, Whole
from kt_sft.serving.messages import ChatMessage

# Field -> values that mean nothing is asked; any other is refused rather than ignored. Names of other servers as well.
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (None, []),
    "audio": (None,),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "chat_template_kwargs": (None, {}),
    "echo": (None, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "guided_choice": (None, []),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "logit_bias": (None, {}),
    "logprobs": (None, False),  # 0 asks for those of the tokens that were taken
    "top_logprobs": (None, 0),
    "min_p": (None, 0, 0.0),
    "min_tokens": (None, 0),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "stop_token_ids": (None, []),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "web_search_options": (None,),
}


class StreamOptions(Strict):
    include_usage: bool = False


class Tool(Strict):
    type: Literal["function"] = "function"
    function: dict[str, Any]


class Request(Strict):
    """What chat and completions share. `top_k`, `repetition_penalty` and `ignore_eos` are names of other servers."""

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[Whole, Field(ge=-1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    n: Annotated[Whole, Field(ge=1, le=16)] | None = None
    seed: Seed | None = None
    stop: str | Items[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False

    def refuse_unsupported(self) -> None:
        """Raise for a field that would change the answer and that this server cannot follow."""
        for name, value in (self.model_extra or {}).items():
            idle = NOT_SUPPORTED.get(name)
            if idle is not None and not any(type(one) is type(value) and one == value for one in idle):
                raise RequestError(400, f"{name}: not supported by this server; leave it out", param=name)

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Request):
    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    tools: Items[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Request):
    prompt: str | Items[int] | Items[str] | Items[Items[int]]

    @property
    def limit(self) -> int:
        return self.max_tokens or 16
