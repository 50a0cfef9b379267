"""LoRA options that are refused: which, where and why. Every door asks this table.

What an adapter's tensors may be, and which form on disk holds them, is another matter (`kinds`), and so are types and
ranges (`schema`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_sft.adapters.schema import find_faults
from kt_sft.errors import FormatError

RUN = "run"  # a run of LLaMA-Factory, from its keys
TRAIN = "train"  # get_peft_model, PEFT's own calls, TRL
LOAD = "load"  # a saved adapter into a model
READ = "read"  # a saved adapter without PEFT: merge, convert, export, plan
EXPERTS, BIASES = "experts", "biases"  # what a refusal is about
MAX_RANK = 256  # of LoRA on routed experts: kMaxRank of the kernels
OFF = "set expert_lora=False to train without the experts"


@dataclass(frozen=True)
class Refusal:
    """Values of an option of PEFT's LoraConfig that some doors refuse.

    In the texts `{value}` stands for the value and `{name}` for the module that it is about.

    Args:
        refuses: whether a value is one of them.
        doors: that refuse it.
        why: a sentence on a config that a user writes.
        remedy: what to do about it.
        expected, found: the same of a file, for the doors that read one.
        scope: EXPERTS: only with LoRA on routed experts; BIASES: only with biases that would be trained.
    """

    option: str
    refuses: Callable[[Any], bool]
    doors: tuple[str, ...]
    why: str
    remedy: str = "remove it"
    expected: str = ""
    found: str = "{value}"
    scope: str | None = None

    def sentence(self, value: Any, name: str = "") -> str:
        """Option, reason and remedy."""
        off = f", or {OFF}" if self.scope == EXPERTS else ""
        return f"{self.option}: {self.why.format(value=repr(value), name=name)}; {self.remedy}{off}"


def _is_set(value: Any) -> bool:
    return bool(value)


def _begins(*names: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value.lower().startswith(names)


def _begins_otherwise(value: Any) -> bool:
    return not isinstance(value, bool) and str(value).lower() != "gaussian"


_UNSUPPORTED = "expert LoRA does not support it"
_ELSEWHERE = "save it with PEFT's path_initial_model_for_weight_conversion"
REFUSALS = (
    Refusal(
        "use_dora", _is_set, (RUN, TRAIN, LOAD), _UNSUPPORTED, "remove use_dora", scope=EXPERTS,
    ),
    Refusal(
        "use_dora", _is_set, (READ,), _UNSUPPORTED, "train the experts without DoRA",
        expected="an adapter without expert LoRA", found="LoRA on {name}", scope=EXPERTS,
    ),
    Refusal("lora_bias", _is_set, (TRAIN, LOAD), _UNSUPPORTED, "remove lora_bias", scope=EXPERTS),
    # Files that have one of these are refused by `schema`, as keys beyond plain LoRA.
    *(
        Refusal(option, _is_set, (TRAIN,), _UNSUPPORTED, f"remove {option}", scope=EXPERTS)
        for option in ("fan_in_fan_out", "use_qalora", "arrow_config")
    ),
    Refusal(
        "alora_invocation_tokens", lambda value: value is not None, (TRAIN,),
        "expert LoRA does not support aLoRA", scope=EXPERTS,
    ),
    Refusal(
        "init_lora_weights", _begins_otherwise, (TRAIN, LOAD),
        "expert LoRA needs True, False or 'gaussian', got {value}", "change it", scope=EXPERTS,
    ),
    Refusal(
        "r", lambda value: not 1 <= value <= MAX_RANK, (RUN, TRAIN, LOAD),
        f"expert LoRA needs a rank of 1 to {MAX_RANK}, got {{value}} for {{name}}", "lower it", scope=EXPERTS,
    ),
    Refusal(
        "init_lora_weights", _begins("pissa"), (RUN,),
        "PiSSA changes the base weights, which the expert kernels keep packed",
    ),
    # These move a part of the weights into the factors: the adapter belongs to what they leave of them.
    Refusal(
        "init_lora_weights", _begins("pissa", "olora", "corda", "loftq", "lora_ga"), (READ,),
        "{value}: the adapter belongs to what it leaves of the base weights", _ELSEWHERE,
        expected="LoRA of the base model's own weights", found="{value}, LoRA of what it left of them",
    ),
    # PEFT would ask for what they begin with, although the factors are in the file.
    Refusal(
        "init_lora_weights", lambda value: isinstance(value, str) and value.lower() in ("corda", "loftq", "lora_ga"),
        (LOAD,), "{value} begins with further files", _ELSEWHERE,
        expected="LoRA that begins without further files",
    ),
    # Of a saved adapter a warning says that they are missing.
    Refusal(
        "bias", lambda value: value == "lora_only", (TRAIN,),
        "{value} would train biases such as that of {name}, and PEFT does not save them", "use 'all' or 'none'",
        scope=BIASES,
    ),
    Refusal("megatron_config", _is_set, (TRAIN,), "PEFT would import the module that it names"),
    Refusal("layer_replication", _is_set, (TRAIN,), "PEFT would copy layers, whose experts are packed once"),
)  # fmt: skip


def refused(door: str, values: Mapping[str, Any], there: Mapping[str, str] | None = None) -> Iterator[Refusal]:
    """What a door refuses of a config.

    Args:
        values: of PEFT's options; those that are missing are not looked at.
        there: of EXPERTS and BIASES what the model and the config have, each with the name of one.
    """
    for row in REFUSALS:
        is_about = row.scope is None or row.scope in (there or {})
        if door in row.doors and is_about and row.option in values and row.refuses(values[row.option]):
            yield row


def faults(door: str, values: Mapping[str, Any], there: Mapping[str, str] | None = None) -> list[str]:
    """The same as sentences, for a config that a user writes."""
    named = there or {}
    return [row.sentence(values[row.option], named.get(row.scope or "", "")) for row in refused(door, values, named)]


def check_file(door: str, values: Mapping[str, Any], path: Path, experts: Iterable[str] = ()) -> None:
    """Raise for the first option of a saved adapter that a door refuses.

    Args:
        experts: modules that have LoRA; without any, what has to do with experts is not looked at.
    Raises:
        FormatError: names the option.
    """
    name = next(iter(experts), "")
    for row in refused(door, values, {EXPERTS: name} if name else {}):
        found = row.found.format(value=repr(values[row.option]), name=name)
        raise FormatError(path, row.option, expected=row.expected, found=found, remedy=row.remedy)


def afterwards(values: Mapping[str, Any]) -> list[str]:
    """What can be trained, and neither be merged nor converted afterwards; one sentence each."""
    unread = [fault.key.strip("'") for fault in find_faults(values)]
    sentences = [f"{key}: with it, the adapter can be neither loaded, merged nor converted here" for key in unread]
    for row in refused(READ, values):
        why = row.why.format(value=repr(values[row.option]), name="")
        sentences.append(f"{row.option} {why} and can neither be merged nor converted; {row.remedy} for that")
    return sentences
