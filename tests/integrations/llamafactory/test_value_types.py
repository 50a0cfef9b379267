"""Values of a configuration have the types of their keys, or a line says which has not; numbers are within range."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import pytest

from kt_sft.integrations.llamafactory import args, value_types


class Strategy(StrEnum):
    NO = "no"
    STEPS = "steps"


@dataclass
class Keys:
    """One key of each kind of type that LLaMA-Factory and transformers have."""

    do_train: bool = False
    packing: bool | None = None
    max_steps: int = -1
    max_samples: int | None = None
    learning_rate: float = 1e-4
    template: str | None = None
    lora_target: str = "all"
    report_to: None | str | list[str] = None
    stage: Literal["sft", "dpo"] = "sft"
    save_strategy: Strategy | str = "steps"
    deepspeed: dict | str | None = None
    label_names: list[str] | None = None
    trackio: str | Literal[False] | None = None
    anything: Any = None
    resume_from_checkpoint: str | None = None
    kt_method: str | None = None
    derived: int = field(default=0, init=False)


FITTING = {
    "do_train": [True, False, 0, 1], "packing": [None, True], "max_steps": [3, -1], "max_samples": [None, 5],
    "learning_rate": [1, 1e-4], "template": [None, "qwen"], "lora_target": ["all", "a, b", ["a", "b"]],
    "report_to": [None, "none", ["wandb"]], "stage": ["dpo"], "save_strategy": ["no", Strategy.STEPS],
    "deepspeed": [{}, "file.json", None], "label_names": [["a"], None], "trackio": [False, "x"],
    "anything": [object(), "x", 3], "kt_method": [8, ["BF16"]], "unknown": [object()],
    "resume_from_checkpoint": [True, False, "true", "out/checkpoint-4", None],
}  # fmt: skip
OTHERS = {
    "do_train": [("false", "true or false, found 'false'; write the value without quotes"), (2, "found 2"),
                 ("maybe", "found 'maybe'"), (None, "found nothing; remove the key"), ([True], "found [True]")],
    "packing": [("true", "true or false or nothing"), (0.5, "found 0.5")],
    "max_steps": [("3", "a whole number, found '3'; write the value without quotes"), (1.5, "found 1.5"),
                  (True, "True, as YAML reads yes"), ("three", "found 'three'")],
    "max_samples": [("", "found ''")],
    "learning_rate": [("1e-4", "a number, found '1e-4'; write"), (True, "a number"), ("fast", "found 'fast'")],
    "template": [(3, "text or nothing, found 3; put it in quotes"), (False, "put the word in quotes"),
                 (["qwen"], "found ['qwen']")],
    "lora_target": [("", "an empty one"), ("a,", "an empty one in 'a,'"), (["a", " "], "an empty one"), (3, "text"),
                    ({"a": 1}, "text")],
    "report_to": [(False, "put the word in quotes"), (3, "text")],
    "stage": [("SFT", "one of sft, dpo, found 'SFT'; did you mean 'sft'?"), (1, "one of sft, dpo")],
    "save_strategy": [(False, "one of no, steps, found False, as YAML reads yes, no"), ("step", "mean 'steps'")],
    "deepspeed": [(2, "a mapping or text or nothing"), ([1], "found [1]")],
    "label_names": [("a", "a list or nothing, found 'a'")],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in FITTING.items() for value in values])
def test_what_fits_stays_as_it_is(key, value):
    assert value_types.read({key: value}, [Keys]) == ({key: value}, [])


@pytest.mark.parametrize(("key", "value", "words"), [(key, *case) for key, cases in OTHERS.items() for case in cases])
def test_another_type_is_one_line_with_the_key(key, value, words):
    _, (fault,) = value_types.read({key: value}, [Keys])
    assert fault.startswith(f"{key}: expected ") and words in fault and "\n" not in fault


def test_a_whole_number_may_be_written_as_1e3():
    values = {"max_steps": 1e3, "learning_rate": 1.0, "max_samples": 2.0}
    read, faults = value_types.read(values, [Keys])
    assert not faults and {key: type(value) for key, value in read.items()} == {
        "max_steps": int,
        "learning_rate": float,
        "max_samples": int,
    }


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
@pytest.mark.parametrize("key", ["learning_rate", "repetition_penalty"])
def test_numbers_above_zero(key, value):
    (fault,) = args.range_faults({key: value})
    assert fault == f"{key}: expected a number > 0, found {value}"


@pytest.mark.parametrize(
    ("key", "least"), [("gradient_accumulation_steps", 1), ("cutoff_len", 1), ("lora_alpha", 1), ("val_size", 0)]
)
def test_least_numbers(key, least):
    assert not list(args.range_faults({key: least}))
    assert list(args.range_faults({key: least - 1}))


def test_a_probability_is_below_one():
    assert not list(args.range_faults({"lora_dropout": 0.0, "adam_beta1": 0.999, "top_p": 1.0}))
    assert len(list(args.range_faults({"lora_dropout": 1.0, "adam_beta1": 1.0, "top_p": 1.1}))) == 3
