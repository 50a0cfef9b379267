"""What the values of a config.json may be: types and bounds by name, and how those of one model go together.

Whatever builds a model believes them: 10^9 layers are built until somebody ends the process, and experts that are
chosen 9 of 8 fail in the first training step. Names are those of transformers' families; unknown ones are left to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kt_sft.errors import FormatError

# Far above what any model has, and low enough that sizes of tensors stay below 2^63 bytes.
MOST_LAYERS, MOST_EXPERTS, MOST_HEADS, MOST_MODULES = 1 << 10, 1 << 14, 1 << 14, 1 << 17
MOST_SIZE, MOST_VOCABULARY, MOST_LENGTH = 1 << 20, 1 << 24, 1 << 31
_MOST_NUMBER = 1 << 53
# Read elsewhere, or not at all.
_NOT_READ = ("quantization_config", "compression_config", "id2label", "label2id", "auto_map", "task_specific_params")


@dataclass(frozen=True)
class Fault:
    """One value that no model can have.

    Args:
        key: with the names of what is around it, `text_config.hidden_size`.
    """

    key: str
    expected: str
    found: str


@dataclass(frozen=True)
class _Whole:
    """A whole number; one for each layer as well where families have that."""

    least: int
    most: int
    has_lists: bool = False

    def fault(self, value: Any) -> str | None:
        items = value if isinstance(value, list) and self.has_lists else [value]
        if all(type(item) is int and self.least <= item <= self.most for item in items if item is not None):
            return None
        return f"a whole number from {self.least} to {self.most}"


@dataclass(frozen=True)
class _Number:
    """A finite number; several as well where families have that."""

    least: float
    most: float
    is_open: bool = False
    has_lists: bool = False

    def fault(self, value: Any) -> str | None:
        items = value if isinstance(value, list) and self.has_lists else [value]
        if all(item is None or self._holds(item) for item in items):
            return None
        return f"a number {'above' if self.is_open else 'from'} {self.least:g}, at most {self.most:g}"

    def _holds(self, item: Any) -> bool:
        if type(item) not in (int, float) or not self.least <= item <= self.most:
            return False
        return item != self.least or not self.is_open


@dataclass(frozen=True)
class _Kind:
    """True or false, a text, a list or a mapping."""

    kinds: tuple[type, ...]
    name: str

    def fault(self, value: Any) -> str | None:
        return None if value is None or type(value) in self.kinds else self.name


_TEXT = _Kind((str,), "a text")
_SIZE, _LENGTH = _Whole(0, MOST_SIZE), _Whole(0, MOST_LENGTH)
_LAYERS, _EVERY = _Whole(0, MOST_LAYERS, has_lists=True), _Whole(1, MOST_LAYERS)
_HEADS, _FEW_EXPERTS = _Whole(1, MOST_HEADS, has_lists=True), _Whole(0, MOST_EXPERTS, has_lists=True)
_FREQUENCY, _ROPE_NUMBER = _Number(0, 1e18, is_open=True), _Number(0, 1e9, is_open=True, has_lists=True)
# Name -> what it holds; the first expression that fits all of a name decides. `null` stands for a default everywhere.
_RULES: tuple[tuple[str, _Whole | _Number | _Kind], ...] = (
    (r"model_type|hidden_act|hidden_activation|dtype|torch_dtype|rope_type|topk_method|scoring_func", _TEXT),
    (r"layer_types|mlp_layer_types|layers_block_type|architectures", _Kind((list, tuple), "a list")),
    (r"(text|vision|audio|thinker|talker)_config", _Kind((dict,), "an object")),
    (r"rope_scaling|rope_parameters|quantization_config", _Kind((dict,), "an object or null")),
    (r"num_hidden_layers|n_layers?", _Whole(1, MOST_LAYERS)),
    (r"(num_\w+|\w*(en|de)coder|max_window)_layers|num_layers|depth|num_mtp_modules", _Whole(0, MOST_LAYERS)),
    (r"first_k_dense_replace|(expert|attn)_layer_offset|mlp_only_layers", _LAYERS),
    (r"moe_layers|moe_layer_freq", _LAYERS),
    (r"(en|de)coder_sparse_step|(moe|no_rope)_layer_interval|interleave_moe_layer_step", _EVERY),
    (r"(expert|attn)_layer_period|global_attn_every_n_layers|full_attention_interval", _EVERY),
    (r"(num|n|\w*_num|\w+_n|encoder|decoder)_(attention_|kv_|key_value_|key_|value_)*heads?", _HEADS),
    (r"(encoder|decoder)_attention_heads|kv_n_heads", _HEADS),
    (r"num_labels", _Whole(0, MOST_MODULES)),
    (r"(n|num|moe_num)_(routed_|local_|shared_)?experts", _FEW_EXPERTS),
    (r"num_experts_per_tok(en)?|moe_k|moe_top_?k|top_k_experts|moe_num_\w*experts", _FEW_EXPERTS),
    (r"n_groups?|topk_group", _Whole(1, MOST_EXPERTS)),
    (r"hidden_size|d_model", _Whole(1, MOST_SIZE)),
    (r"(moe_)?intermediate_size|(expert_)?ffn_hidden_size", _Whole(1, MOST_SIZE, has_lists=True)),
    (r"vocab_size(_per_layer_input)?", _Whole(1, MOST_VOCABULARY)),
    (r"head_dim|v_head_dim|kv_lora_rank", _Whole(1, MOST_SIZE)),
    (r"(q_lora|mamba_dt)_rank|\w+_head_dim|(shared_expert_|shared_)intermediate_size|sliding_window", _LENGTH),
    (r"(original_)?max_position_embeddings|max_(sequence_length|seq_len)|index_topk", _LENGTH),
    (r"(\w+_)?(norm_)?(eps|epsilon)", _Number(0, 1, is_open=True)),
    (r"(\w+_)?rope_theta|rope_local_base_freq", _FREQUENCY),
    (r"partial_rotary_factor", _Number(0, 1, is_open=True)),
    (r"routed_scaling_factor|router_scaling_factor|route_scale", _Number(0, 1e6, is_open=True)),
    (r"initializer_range", _Number(0, 1e6)),
)  # fmt: skip
# Of other names: what is repeated so often, or so large, has a bound; -1 and switches have a meaning of their own.
_OTHERS: tuple[tuple[str, _Whole | _Number], ...] = (
    (r"num_\w*(tokens|param\w*)|\w*chunk_size", _Whole(-1, _MOST_NUMBER, has_lists=True)),
    (r"num_\w*(embeddings|positions|channels|bins|patches)", _Whole(-1, MOST_SIZE, has_lists=True)),
    (r"num_\w+", _Whole(-1, MOST_MODULES, has_lists=True)),
    (r"\w+_(dim|rank|size|channels)", _Whole(-1, MOST_LENGTH, has_lists=True)),
)  # fmt: skip
# Inside rope_scaling and rope_parameters, whatever their depth.
_ROPE_RULES = (
    (r"rope_theta", _FREQUENCY),
    (r"factor", _Number(0, 1e6, is_open=True)),
    (r"(long|short|low_freq|high_freq|attention)_factor|beta_(fast|slow)", _ROPE_NUMBER),
    (r"mscale(_all_dim)?", _Number(0, 1e6)),
    (r"mrope_section", _Whole(0, MOST_SIZE, has_lists=True)),
    *_RULES,
)  # fmt: skip
_BY_NAME, _IN_ROPE, _BY_OTHER_NAME = (
    tuple((re.compile(name), rule) for name, rule in rules) for rules in (_RULES, _ROPE_RULES, _OTHERS)
)
_ID = re.compile(r"(bos|eos|pad|sep|unk|eod|decoder_start)_token_id")
_ANY_ID = re.compile(r"\w+_token_(id|index)")
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts", "moe_num_primary_experts")
_CHOSEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts",
    "moe_num_active_primary_experts",
)  # fmt: skip
_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "moe_layer_freq")


def find_faults(values: Mapping[str, Any], *, has_defaults: bool = False) -> list[Fault]:
    """What no model can have, in the order of the file; empty where all is well.

    Args:
        has_defaults: the values are those of a config class: its special tokens may be those of a larger vocabulary.
    """
    return list(_level(values, "", MOST_VOCABULARY if has_defaults else None, has_defaults))


def check_values(
    path: object, values: Mapping[str, Any], names: Mapping[str, str] | None = None, *, has_defaults: bool = False
) -> None:
    """Raise where a model's configuration holds what no model can have.

    Args:
        path: of the file.
        names: what the file calls the keys, where these are others.
        has_defaults: see `find_faults`.
    Raises:
        FormatError: names the first such key.
    """
    faults = find_faults(values, has_defaults=has_defaults)
    if faults:
        first, more = faults[0], f" (and {len(faults) - 1} more keys)" if len(faults) > 1 else ""
        remedy = "correct it, or download the file again"
        key = (names or {}).get(first.key, first.key)
        raise FormatError(path, key, expected=first.expected, found=first.found + more, remedy=remedy)


def _level(
    values: Mapping[str, Any], prefix: str, vocabulary: int | None, has_defaults: bool = False
) -> Iterator[Fault]:
    """Faults of one mapping and of those in it.

    Args:
        vocabulary: of the model around it.
    """
    vocabulary = vocabulary if has_defaults else _vocabulary(values) or vocabulary
    found: list[Fault] = []
    for key, value in ((str(key), value) for key, value in values.items()):
        own = [*_by_name(_BY_NAME, prefix, key, value), *_token_id(f"{prefix}{key}", key, value, vocabulary)]
        if not own and isinstance(value, dict) and key not in _NOT_READ:
            inner = f"{prefix}{key}."
            is_rope = key in ("rope_scaling", "rope_parameters")
            own = [*(_rope(value, inner) if is_rope else _level(value, inner, vocabulary, has_defaults))]
        found += own
    yield from found or _relations(values, prefix)


def _vocabulary(values: Mapping[str, Any]) -> int | None:
    text = values.get("text_config")
    size = values.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return size if type(size) is int and size > 0 else None


def _rope(values: Mapping[str, Any], prefix: str) -> Iterator[Fault]:
    for key, value in values.items():
        if isinstance(value, dict):  # by kind of layer
            yield from _rope(value, f"{prefix}{key}.")
        else:
            yield from _by_name(_IN_ROPE, prefix, str(key), value)


def _by_name(rules: tuple[tuple[re.Pattern, Any], ...], prefix: str, key: str, value: Any) -> Iterator[Fault]:
    rule = next((rule for name, rule in rules if name.fullmatch(key)), None)
    if rule is not None:
        expected = rule.fault(value)
    elif not _is_plain(key, value):
        expected = "a finite number"
    else:
        numbers = [item for item in _flat(value) if type(item) in (int, float)]
        expected = next((rule.fault(numbers) for name, rule in _BY_OTHER_NAME if name.fullmatch(key)), None)
    if expected is not None:
        yield Fault(f"{prefix}{key}"[:200], expected, _shown(value))


def _is_plain(key: str, value: Any) -> bool:
    """Whether the numbers of a key that no rule is for are ones: ranges of some models have no upper limit."""
    numbers = [item for item in _flat(value) if type(item) in (int, float)]
    if key.endswith("_limit"):
        return not any(math.isnan(number) for number in numbers)
    return all(abs(number) <= _MOST_NUMBER for number in numbers)


def _flat(value: Any) -> list[Any]:
    """What lists hold, and lists in them; mappings among it are left out."""
    if not isinstance(value, list):
        return [value]
    return [item for inner in value for item in (inner if isinstance(inner, list) else [inner])]


def _token_id(path: str, key: str, value: Any, vocabulary: int | None) -> Iterator[Fault]:
    """Special tokens lie in the vocabulary; those of pictures and sound may belong to a tokenizer that has more."""
    if not _ANY_ID.fullmatch(key) or value is None:
        return
    most = vocabulary - 1 if vocabulary is not None and _ID.fullmatch(key) else MOST_VOCABULARY
    items = value if isinstance(value, list) else [value]
    if not all(type(item) is int and 0 <= item <= most for item in items):
        yield Fault(path, f"a token from 0 to {most}, the last of the vocabulary, or null", _shown(value))


def _relations(values: Mapping[str, Any], prefix: str) -> Iterator[Fault]:
    """How the numbers of one level go together; their types have been checked."""

    def number(*names: str) -> tuple[str, int | None]:
        """The first that is there, by its name."""
        name = next((name for name in names if type(values.get(name)) is int), names[0])
        return name, values.get(name) if type(values.get(name)) is int else None

    def fault(name: str, expected: str) -> Fault:
        return Fault(f"{prefix}{name}", expected, _shown(values.get(name)))

    if values.get("quantization_config") == {}:
        yield fault("quantization_config", "quant_method in it, or null")
    layers_name, layers = number("num_hidden_layers", "num_layers", "n_layers")
    heads_name, heads = number("num_attention_heads", "n_heads")
    kv_name, kv_heads = number("num_key_value_heads")
    experts_name, experts = number(*_EXPERTS)
    chosen_name, chosen = number(*_CHOSEN)
    if heads and kv_heads and heads % kv_heads:
        yield fault(kv_name, f"a divisor of {heads_name} {heads}")
    if experts and chosen is not None and not 1 <= chosen <= experts:
        yield fault(chosen_name, f"a whole number from 1 to {experts_name} {experts}")
    if layers:
        yield from _of_layers(values, layers_name, layers, fault)
        if experts and layers * experts > MOST_MODULES:
            yield fault(experts_name, f"at most {MOST_MODULES} experts in {layers} layers")
    if experts:
        yield from _of_groups(values, experts_name, experts, chosen, fault)


def _of_layers(values: Mapping[str, Any], name: str, layers: int, fault: Any) -> Iterator[Fault]:
    first = values.get("first_k_dense_replace")
    if type(first) is int and first > layers:
        yield fault("first_k_dense_replace", f"a whole number from 0 to {name} {layers}")
    for key in _PER_LAYER:
        if isinstance(value := values.get(key), list) and value and len(value) != layers:
            yield Fault(fault(key, "").key, f"one value for each of {layers} layers", f"{len(value)} values")
    for key in ("mlp_only_layers", "moe_layers"):
        if isinstance(value := values.get(key), list) and any(item >= layers for item in value if item is not None):
            yield fault(key, f"numbers of layers below {name} {layers}")


def _of_groups(values: Mapping[str, Any], name: str, experts: int, chosen: int | None, fault: Any) -> Iterator[Fault]:
    """Routing limited to groups of experts."""
    groups, used = values.get("n_group"), values.get("topk_group")
    if type(groups) is not int:
        return
    if experts % groups:
        yield fault("n_group", f"a divisor of {name} {experts}")
    elif type(used) is int and used > groups:
        yield fault("topk_group", f"a whole number from 1 to n_group {groups}")
    elif type(used) is int and chosen and chosen > experts // groups * used:
        yield fault("topk_group", f"groups that hold the {chosen} experts of a token, {experts // groups} in each")


def _shown(value: Any) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"a list of {len(value)}, {str(value[:4])[:60]} ..."
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 200 else "a number of more than 60 digits"
    return text if len(text) <= 80 else f"{text[:76]} ..."
