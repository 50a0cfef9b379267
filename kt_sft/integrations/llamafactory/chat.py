"""LLaMA-Factory's chat model as a backend of kt_sft.serving.

LLaMA-Factory parses the configuration, loads model, tokenizer and adapter, and knows the chat template. Generation is
called here, not through its engine, which can neither stop at a token nor say how an answer ended.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from kt_sft.adapters.folder import local_adapter
from kt_sft.compat.transformers import keeps_state
from kt_sft.errors import ConfigError
from kt_sft.inference.backend import MIN_TEMPERATURE, ModelFacts, PromptError, Sampling, ToolCall
from kt_sft.integrations import peft as kt_peft
from kt_sft.integrations.llamafactory import autoload
from kt_sft.integrations.llamafactory.args import adapter_paths
from kt_sft.integrations.llamafactory.run_file import read_run_file

__all__ = ["LlamaFactoryChat", "load", "read_run_file"]
MAX_SCAN_STEPS = 20_000_000  # characters that LLaMA-Factory's patterns may look at in vain in one message; about 0.2 s


def load(config: dict[str, Any], *, model_name: str | None = None, prefill_chunk: int = 512) -> LlamaFactoryChat:
    """Load what a configuration of LLaMA-Factory for chat names.

    Args:
        config: `use_kt: true` takes our kernels, whatever USE_KT says.
        model_name: under which it is served; default: the directory's name.
        prefill_chunk: tokens of a long prompt between two chances to stop.

    Raises:
        KTError: all that can be known before the weights are read.
    """
    if not config.get("model_name_or_path"):
        raise ConfigError("model_name_or_path: missing; name the model that is to be served")
    if config.get("num_beams") not in (None, 1):
        raise ConfigError(
            f"num_beams: expected 1, found {config['num_beams']!r}; an answer is sent token by token, before a beam "
            "search has chosen it"
        )
    if config.get("use_kt"):
        autoload.install()
    for adapter in adapter_paths(config):
        local_adapter(adapter, subfolder=config.get("adapter_folder"), cache_dir=config.get("cache_dir"))
    from llamafactory.chat import ChatModel

    chat_model = ChatModel(dict(config))
    if chat_model.engine.name != "huggingface" or not chat_model.engine.can_generate:
        raise ConfigError("infer_backend, stage: expected huggingface and sft; other engines have servers of their own")
    # The first call sets the tokenizer's padding and truncation, which must not happen while it is in use; later calls
    # find them set, so that several threads may encode at a time.
    chat_model.engine.tokenizer.encode("a")
    return LlamaFactoryChat(chat_model.engine, config, model_name=model_name, prefill_chunk=prefill_chunk)


class LlamaFactoryChat:
    """LLaMA-Factory's chat model; see `kt_sft.inference.backend.ChatBackend`.

    Args:
        engine: LLaMA-Factory's HuggingfaceEngine.
    """

    def __init__(self, engine: Any, config: dict[str, Any], *, model_name: str | None = None, prefill_chunk: int = 512):
        self._engine = engine
        self._tokenizer, self._template = engine.tokenizer, engine.template
        # PEFT's own `generate` replaces methods of the model meanwhile, which is nothing for several at a time.
        self._peft = engine.model if isinstance(engine.model, PeftModel) else None
        self._model = engine.model.get_base_model() if self._peft is not None else engine.model
        self._adapter_is_on = True
        self._now = threading.local()
        self._prefill_chunk = prefill_chunk if _can_chunk(self._model) else None
        self._model.register_forward_pre_hook(self._before_forward)
        self.facts = _facts(engine, config, model_name, has_switch=self._peft is not None)

    def encode_chat(self, messages: list[dict[str, str]], system: str | None, tools: str | None) -> list[int]:
        for message in messages:
            self._check_scans(message["content"])
        turns = [*(dict(message) for message in messages), {"role": "assistant", "content": ""}]
        ids, _ = self._template.encode_oneturn(self._tokenizer, turns, system, tools)
        return ids

    def _check_scans(self, text: str) -> None:
        """Raise where LLaMA-Factory would look for the end of thoughts or calls from each of very many beginnings."""
        for words in (self._template.thought_words, self._template.tool_call_words):
            if not words or len(words) != 2 or not all(words):
                continue
            begin, end = words
            rest = text[text.rfind(end) + 1 :]
            if (count := rest.count(begin)) * len(rest) > MAX_SCAN_STEPS:
                raise PromptError(f"expected each {begin.strip()} to be closed, found {count} that are not")

    def encode_text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def tool_calls(self, text: str) -> list[ToolCall]:
        found = self._template.extract_tool(text)
        return [] if isinstance(found, str) else [ToolCall(call.name, call.arguments) for call in found]

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        on_token: Callable[[int], bool],
        pause: Callable[[], None],
    ) -> str:
        settings = self._settings(len(prompt_ids), sampling)
        random = _RandomState(self._model.device) if settings.do_sample else None

        def keep_state_and_pause() -> None:
            if random is not None:
                random.save()
            pause()
            if random is not None:
                random.restore()
            self._switch(sampling.adapter)

        if random is not None:
            torch.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)
        self._switch(sampling.adapter)
        stop_ids = set(settings.eos_token_id)
        step = _Step(stop_ids, on_token, keep_state_and_pause)
        self._now.before_part = keep_state_and_pause
        self._now.is_prefill, self._now.num_parts = step.is_prefill, 0
        try:
            inputs = torch.tensor([list(prompt_ids)], device=self._model.device)  # [1, tokens]
            with torch.inference_mode():
                self._model.generate(
                    inputs=inputs,
                    attention_mask=torch.ones_like(inputs),
                    generation_config=settings,
                    stopping_criteria=StoppingCriteriaList([step]),
                    logits_processor=_penalties(len(prompt_ids), sampling),
                )
        finally:
            self._now.before_part = None
        return "stop" if step.saw_end else "length"

    def _settings(self, prompt_tokens: int, sampling: Sampling) -> GenerationConfig:
        """LLaMA-Factory's settings with those of the request in their places."""
        values = dict(self._engine.generating_args)
        asked = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty,
        }
        values |= {name: value for name, value in asked.items() if value is not None}
        if sampling.temperature is not None:
            values["do_sample"] = True
        if (values["temperature"] or 0.0) < MIN_TEMPERATURE:
            values["do_sample"] = False
        if not values["do_sample"]:
            for name in ("temperature", "top_p", "top_k"):
                values.pop(name, None)
        values.pop("max_length", None)
        values["max_new_tokens"] = sampling.max_tokens
        if sampling.ignore_eos:
            values["min_new_tokens"] = sampling.max_tokens
        if self._prefill_chunk is not None and prompt_tokens > self._prefill_chunk:
            values["prefill_chunk_size"] = self._prefill_chunk
        values["eos_token_id"] = self._template.get_stop_token_ids(self._tokenizer)
        values["pad_token_id"] = self._tokenizer.pad_token_id
        return GenerationConfig(**values)

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        """Between the parts of a prompt; decoding pauses in `_Step`, outside what transformers switches for it."""
        if getattr(self._now, "before_part", None) is not None and self._now.is_prefill():
            if self._now.num_parts:
                self._now.before_part()
            self._now.num_parts += 1

    def _switch(self, on: bool) -> None:
        if self._peft is None or on == self._adapter_is_on:
            return
        (self._peft.base_model.enable_adapter_layers if on else self._peft.base_model.disable_adapter_layers)()
        self._adapter_is_on = on


class _Step(StoppingCriteria):
    """What happens after every token: it is handed on, and others get their turn."""

    def __init__(self, stop_ids: set[int], on_token: Callable[[int], bool], pause: Callable[[], None]):
        self._stop_ids, self._on_token, self._pause = stop_ids, on_token, pause
        self._num_tokens = 0
        self.saw_end = False

    def is_prefill(self) -> bool:
        return self._num_tokens == 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._num_tokens += 1
        token = int(input_ids[0, -1])
        self.saw_end = token in self._stop_ids
        is_done = self._on_token(token) or self.saw_end
        if not is_done:
            self._pause()
        return torch.tensor([is_done], device=input_ids.device)


class _Penalties(LogitsProcessor):
    """OpenAI's presence and frequency penalties, of the tokens of the answer."""

    def __init__(self, prompt_tokens: int, presence: float, frequency: float):
        self._prompt_tokens, self._presence, self._frequency = prompt_tokens, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.zeros_like(scores)  # [1, vocab]
        answer = input_ids[:, self._prompt_tokens :]
        counts.scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


def _penalties(prompt_tokens: int, sampling: Sampling) -> LogitsProcessorList:
    presence, frequency = sampling.presence_penalty, sampling.frequency_penalty
    return LogitsProcessorList([_Penalties(prompt_tokens, presence, frequency)] if presence or frequency else [])


class _RandomState:
    """torch's generator, which transformers samples from, as one of several generations left it."""

    def __init__(self, device: torch.device):
        self._device = device if device.type == "cuda" else None

    def save(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(self._device) if self._device is not None else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


def _can_chunk(model: nn.Module) -> bool:
    """Whether a prompt may be computed in parts: only attention over everything surely allows it."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    has_window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return not keeps_state(model) and kinds == {"full_attention"} and not has_window


def _facts(engine: Any, config: dict[str, Any], model_name: str | None, *, has_switch: bool) -> ModelFacts:
    model, tokenizer = engine.model, engine.tokenizer
    settings = model.config.get_text_config()
    directories = [Path(str(config["model_name_or_path"])), *map(Path, adapter_paths(config))]
    base, *adapters = (path.resolve().name for path in directories)
    name = model_name or (adapters[-1] if adapters else base)
    files = sorted(file for path in directories for file in ([path] if path.is_file() else path.glob("*")))
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    listing = json.dumps([(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats])
    kt_config = getattr(model, "kt_config", None)
    count = kt_peft.count_parameters(model)[1] if kt_config else sum(p.numel() for p in model.parameters())
    return ModelFacts(
        name=name,
        base_name=base if has_switch and base != name else None,
        context_length=getattr(settings, "max_position_embeddings", None) or min(tokenizer.model_max_length, 1 << 20),
        default_max_tokens=engine.generating_args.get("max_new_tokens") or 1024,
        vocab_size=settings.vocab_size,
        family=settings.model_type,
        num_parameters=count,
        format=kt_config.method if kt_config else str(model.dtype).removeprefix("torch."),
        size_bytes=sum(stat.st_size for _, stat in stats),
        created=max((stat.st_mtime for _, stat in stats), default=0.0),
        digest=hashlib.sha256(listing.encode()).hexdigest(),
    )
