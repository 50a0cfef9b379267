"""The tokenizer that a GGUF file carries, as a fast tokenizer of transformers.

Keys `tokenizer.ggml.*`: docs/gguf.md of the ggml project. The file only names how text is cut before byte pair encoding
(`pre`); the expressions are those of the models' own tokenizer.json, as llama.cpp's llama-vocab.cpp lists them.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kt_sft.errors import FormatError, UnsupportedModel
from kt_sft.formats.gguf import GgufIndex

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}"
_QWEN2 = rf"{_WORDS}|\p{{N}}{_REST}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Letters of alphabets with upper and lower case.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼ"
    "ℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Expressions are applied one after the other to the pieces that the one before has left.
SPLITS: dict[str, tuple[str, ...]] = {
    "qwen2": (_QWEN2,),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{_DEEPSEEK_LETTERS}]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        "[一-龥ࠀ-一가-퟿]+",
        r"\p{N}+",
    ),
    "deepseek-v3": (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3),
}
# These take a token that is a whole word without merging, and begin a text with its first token unless told otherwise.
_LLAMA3_NAMES = ("llama-bpe", "llama3")
_MOST_TOKEN = 1024  # all ways to cut a token in two are tried
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type


def read_tokenizer(index: GgufIndex) -> PreTrainedTokenizerFast:
    """Vocabulary, merges, special tokens and chat template.

    Raises:
        FormatError: keys missing, or not fitting together.
        UnsupportedModel: a kind of tokenizer, or a way to cut text, that is not known.
    """
    values = _Keys(index)
    tokens = values.strings("tokens")
    if len(set(tokens)) != len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise values.fault("tokens", "every token once", f"{twice[:80]!r} twice")
    if len(longest := max(tokens, key=len)) > _MOST_TOKEN:
        raise values.fault("tokens", f"tokens of at most {_MOST_TOKEN} characters", f"one of {len(longest)}")
    kind = values.text("model")
    if kind == "gpt2":
        tokenizer = _byte_level(values, tokens)
    elif kind == "llama":
        tokenizer = _sentence_piece(values, tokens)
    else:
        raise values.unsupported("model", "gpt2 or llama", kind)
    for number, token in zip(values.numbers("token_type", len(tokens)), tokens, strict=False):
        if number == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif number == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    special = {name: tokens[number] for name, number in values.special(len(tokens)).items()}
    _add_edges(tokenizer, values, special)
    template = index.text("tokenizer.chat_template")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    if template is not None:
        fast.chat_template = template
    return fast


class _Keys:
    """`tokenizer.ggml.*` of a file."""

    def __init__(self, index: GgufIndex):
        self._index = index

    def get(self, key: str, default: Any = None) -> Any:
        return self._index.metadata.get(f"tokenizer.ggml.{key}", default)

    def text(self, key: str, default: str | None = None) -> str | None:
        return self._index.text(f"tokenizer.ggml.{key}", default)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.fault(key, "true or false", str(value)[:80])
        return value

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise self.fault(key, "a list of texts", type(value).__name__)
        return value

    def numbers(self, key: str, count: int) -> list[float]:
        """One per token; empty where the file has none."""
        value = self.get(key, [])
        items = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(items, list) or len(items) not in (0, count) or any(isinstance(i, str | list) for i in items):
            found = f"{len(items)} values" if isinstance(items, list) else type(items).__name__
            raise self.fault(key, f"{count} numbers, one per token", found)
        if any(not math.isfinite(item) for item in items):
            raise self.fault(key, "finite numbers", "a NaN or an infinity")
        return items

    def fault(self, key: str, expected: str, found: object) -> FormatError:
        what, remedy = f"metadata tokenizer.ggml.{key}", "download the file again"
        return FormatError(self._index.source, what, expected=expected, found=found, remedy=remedy)

    def special(self, num_tokens: int) -> dict[str, int]:
        names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        found = {}
        for name, argument in names.items():
            number = self.get(f"{name}_token_id")
            if number is None:
                continue
            if type(number) is not int or not 0 <= number < num_tokens:
                raise self.fault(f"{name}_token_id", f"a number below {num_tokens}", number)
            found[argument] = number
        return found

    def unsupported(self, key: str, expected: str, found: object) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self._index.source}: tokenizer.ggml.{key}",
            expected=expected,
            found=repr(found),
            remedy="use the model directory of its safetensors version, and the GGUF file as kt_weight_path",
        )


def _byte_level(values: _Keys, tokens: list[str]) -> Tokenizer:
    pre = values.text("pre", "gpt-2")
    if pre not in SPLITS:
        raise values.unsupported("pre", " or ".join(SPLITS), pre)
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = []
    for merge in values.strings("merges"):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise values.fault("merges", "pairs of tokens that make a token", repr(merge[:80]))
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in _LLAMA3_NAMES))
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut before byte pair encoding, by its name in a GGUF file."""
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in SPLITS[pre]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentence_piece(values: _Keys, tokens: list[str]) -> Tokenizer:
    """SentencePiece BPE: a merge for every way to put a token together of two others, best score first."""
    scores = values.numbers("scores", len(tokens))
    if len(scores) != len(tokens):
        raise values.unsupported("scores", f"{len(tokens)} numbers", f"{len(scores)}")
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        found = [(left, right) for left, right in pairs if left in vocab and right in vocab]
        found.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(-score, pair) for pair in found]
    merges.sort(key=lambda merge: merge[0])
    unknown = values.special(len(tokens)).get("unk_token")
    unk_token = tokens[unknown] if unknown is not None else None
    pairs = [pair for _, pair in merges]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if values.flag("add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _add_edges(tokenizer: Tokenizer, values: _Keys, special: dict[str, str]) -> None:
    """Begin and end tokens around every text, where the file asks for them, or llama.cpp adds them unasked."""
    adds_first = values.text("model") == "llama" or values.text("pre") in _LLAMA3_NAMES
    first = special.get("bos_token") if values.flag("add_bos_token", adds_first) else None
    last = special.get("eos_token") if values.flag("add_eos_token", False) else None
    if first is None and last is None:
        return
    single = [*([first] if first else []), "$A", *([last] if last else [])]
    pair = [*single, *(f"{part.replace('$A', '$B')}:1" for part in single)]
    edges = [(token, tokenizer.token_to_id(token)) for token in {first, last} if token]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=edges)
