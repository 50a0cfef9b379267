"""What an adapter can train besides LoRA on linear layers, and which forms on disk hold it. Every door asks here.

All kinds are merged, and loaded by the PEFT that runs. docs/adapters.md shows this table, and
tests/adapters/test_adapter_doors.py goes through it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kt_sft.errors import FormatError, UnsupportedModel

if TYPE_CHECKING:
    from kt_sft.adapters.model import Adapter

PEFT_FORMS = ("peft-0.18", "peft-0.19")
FORMS = (*PEFT_FORMS, "vllm", "sglang", "gguf")


@dataclass(frozen=True)
class Kind:
    """One kind of training.

    Args:
        title: what messages call it.
        forms: that hold it.
        replaces: whether it gives a parameter new values rather than adding to the old ones, so that two adapters
            which change the parameter have no sum.
    """

    title: str
    forms: tuple[str, ...] = PEFT_FORMS
    replaces: bool = False


KINDS = {
    "linear": Kind("LoRA on linear layers", FORMS),
    "experts": Kind("LoRA on the routed experts", FORMS),
    "router": Kind("LoRA on the router"),
    "tied_head": Kind("LoRA on a head that the base model ties to its embedding", (*PEFT_FORMS, "vllm", "sglang")),
    "embedding": Kind("LoRA on an embedding"),
    "saved": Kind("modules trained as a whole (modules_to_save)", replaces=True),
    "tokens": Kind("single rows of an embedding (trainable_token_indices)", replaces=True),
    "dora": Kind("DoRA", replaces=True),
    "lora_bias": Kind("biases of lora_B (lora_bias)"),
    "bias": Kind("biases of the base model (bias)", replaces=True),
}


def kinds_of(adapter: Adapter) -> dict[str, str]:
    """The kinds that an adapter holds, each with the first module or parameter of it."""
    base = adapter.base
    found: dict[str, str] = {}
    for name in adapter.linears:
        is_tied = f"{name}.weight" in base.tied
        found.setdefault("router" if name in base.routers else "tied_head" if is_tied else "linear", name)
    for name in adapter.bare:
        found.setdefault("embedding" if "embed" in name.rpartition(".")[0].rpartition(".")[2] else "router", name)
    for name in adapter.experts:
        found.setdefault("experts", name)
    for name in adapter.whole:
        found.setdefault(whole_kind(name), name)
    for extra in adapter.extras:
        found.setdefault(extra.kind, extra.parameter)
    return found


def whole_kind(parameter: str) -> str:
    """Of a parameter that is stored with all its values."""
    return "bias" if "bias" in parameter.rpartition(".")[2] else "saved"


def check_form(adapter: Adapter, form: str) -> None:
    """Whether a form holds everything that an adapter has.

    Raises:
        UnsupportedModel: it does not; names the kind.
    """
    for kind, name in kinds_of(adapter).items():
        if form not in KINDS[kind].forms:
            raise UnsupportedModel(
                f"--to {form}",
                expected="LoRA that this form holds",
                found=f"{KINDS[kind].title}, {name} among them",
                remedy="merge the adapter instead (kt-sft merge)",
            )


def check_merge(adapter: Adapter) -> None:
    """Whether a checkpoint has a place for everything that an adapter has.

    Raises:
        FormatError: a bias that the model has not.
    """
    for extra in adapter.extras:
        if extra.kind == "lora_bias" and extra.parameter not in adapter.base.parameters:
            raise FormatError(
                adapter.source,
                f"{KINDS['lora_bias'].title} of {extra.parameter}",
                expected="a layer that has a bias to add it to",
                found="none in this model, so that it cannot be merged",
                remedy="serve it with PEFT, or train without lora_bias",
            )


def limits(kinds: Iterable[str]) -> list[str]:
    """One sentence for each kind that some door refuses, for those who are about to train it."""
    sentences = []
    for kind in KINDS:
        refusing = [form for form in FORMS if form not in KINDS[kind].forms]
        if kind in kinds and refusing:
            sentences.append(f"{KINDS[kind].title}: can be merged, but not written as an adapter for {_list(refusing)}")
    return sentences


def _list(forms: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(forms[:-1]), forms[-1]]))
