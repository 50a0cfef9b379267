"""A model directory's tokenizer as metadata of a GGUF file: what `gguf_tokenizer` reads, the other way round."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kt_sft.errors import UnsupportedModel
from kt_sft.integrations.gguf import tokenizer as kinds
from kt_sft.integrations.transformers.auto_class import errors_in_one_line

_REMEDY = "merge into hf and convert that with llama.cpp's own script"
# What the ways to cut text differ in: digits, contractions, line breaks, other scripts, punctuation before letters.
_PROBE = (
    "I'll see 1234567 things, DON'T you?\n\n\t  x=12.5;foo_bar(baz)  größer École 你好世界 ひらがな カタカナ Привет "
    "한국어 $100 #tag @x.y\r\n   end...  'S ''re 😀 naïve !hello  A1b2 。、！ "
)


def tokenizer_metadata(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Keys `tokenizer.ggml.*` and the chat template.

    Args:
        vocab_size: rows of the embedding; tokens are filled up to it.
    Raises:
        UnsupportedModel: no fast tokenizer, a damaged one, or one that a GGUF file has no name for.
    """
    with errors_in_one_line(folder, "tokenizer"):
        fast = AutoTokenizer.from_pretrained(folder)
    if not isinstance(fast, PreTrainedTokenizerFast) or not hasattr(fast, "backend_tokenizer"):
        raise _unsupported("a tokenizer of the tokenizers library", type(fast).__name__)
    backend = json.loads(fast.backend_tokenizer.to_str())
    model = backend["model"]
    if model.get("type") != "BPE":
        raise _unsupported("byte pair encoding", model.get("type"))
    tokens, types = _tokens(fast, model, vocab_size)
    if model.get("byte_fallback"):
        values = _sentence_piece(backend, model, tokens, types)
    else:
        values = {"model": "gpt2", "pre": _pre(fast), "merges": _merges(model)}
    values |= {"tokens": tokens, "token_type": types, **_special(fast)}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    if isinstance(fast.chat_template, str):
        metadata["tokenizer.chat_template"] = fast.chat_template
    return metadata


def _unsupported(expected: str, found: object) -> UnsupportedModel:
    return UnsupportedModel("GGUF model: tokenizer", expected=expected, found=found, remedy=_REMEDY)


def _tokens(fast: PreTrainedTokenizerFast, model: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    by_id = {number: token for token, number in fast.get_vocab().items()}
    if by_id and max(by_id) >= vocab_size:
        raise _unsupported(f"at most {vocab_size} tokens, as the embedding has rows", max(by_id) + 1)
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    types = [kinds.NORMAL if number in by_id else kinds.UNUSED for number in range(vocab_size)]
    if model.get("byte_fallback"):
        for number, token in enumerate(tokens):
            if re.fullmatch("<0x[0-9A-F]{2}>", token):
                types[number] = kinds.BYTE
    for number, added in fast.added_tokens_decoder.items():
        types[number] = kinds.CONTROL if added.special else kinds.USER_DEFINED
    unknown = fast.convert_tokens_to_ids(model["unk_token"]) if model.get("unk_token") else None
    if unknown is not None:
        types[unknown] = kinds.UNKNOWN
    return tokens, types


def _merges(model: dict[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _pre(fast: PreTrainedTokenizerFast) -> str:
    """The name of the way in which a tokenizer cuts text, found out by having both cut the same text."""
    own = fast.backend_tokenizer.pre_tokenizer
    wanted = [piece for piece, _ in own.pre_tokenize_str(_PROBE)] if own is not None else None
    for name in kinds.SPLITS:
        if wanted == [piece for piece, _ in kinds.pre_tokenizer(name).pre_tokenize_str(_PROBE)]:
            return name
    raise _unsupported(f"text cut as by {', '.join(kinds.SPLITS)}", "another way")


def _sentence_piece(
    backend: dict[str, Any], model: dict[str, Any], tokens: list[str], types: list[int]
) -> dict[str, Any]:
    """Scores stand for the order of merges: the token that is made first has the highest."""
    order: dict[str, int] = {}
    for merge in _merges(model):
        left, _, right = merge.partition(" ")
        order.setdefault(left + right, len(order))
    scores = [-float(order.get(token, len(order))) for token in tokens]
    for number, kind in enumerate(types):
        if kind in (kinds.CONTROL, kinds.UNKNOWN, kinds.BYTE):
            scores[number] = 0.0
    steps = json.dumps([backend.get("normalizer"), backend.get("pre_tokenizer")])
    has_prefix = '"Prepend"' in steps or '"prepend_scheme": "first"' in steps or '"prepend_scheme": "always"' in steps
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": has_prefix}


def _special(fast: PreTrainedTokenizerFast) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {name: getattr(fast, f"{attribute}_token_id") for name, attribute in names.items()}
    found: dict[str, Any] = {f"{name}_token_id": number for name, number in ids.items() if number is not None}
    edges = fast("a").input_ids
    found["add_bos_token"] = bool(edges) and ids["bos"] is not None and edges[0] == ids["bos"]
    found["add_eos_token"] = bool(edges) and ids["eos"] is not None and edges[-1] == ids["eos"]
    return found
