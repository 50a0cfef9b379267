"""What adapters make of the parameters outside the experts, for whoever merges them.

Several adapters are added up, which has a meaning only where they add: a parameter that one of them replaces is changed
by that one alone. Tied parameters are one matrix until an adapter changes one of them and not the other, as PEFT does
it: `modules_to_save`, LoRA and DoRA belong to the module they name, stored base layers and trained rows to the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kt_sft.adapters.kinds import KINDS, check_merge, whole_kind
from kt_sft.adapters.model import Adapter
from kt_sft.adapters.plain import is_saved
from kt_sft.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 4096  # that are compared at a time


@dataclass(frozen=True, eq=False)
class Step:
    """One thing that an adapter does to a parameter: f32 or f64 -> the same.

    Args:
        parameter: under whose name the adapter holds it.
        is_shared: whether it goes for a matrix and not for one of the modules that share it.
    """

    adapter: Adapter
    kind: str
    parameter: str
    apply: Callable[[Tensor], Tensor]
    is_shared: bool = False


class Changes:
    """Every parameter that adapters change, and how.

    Args:
        tied: parameters that are the same matrix, in the checkpoint as it is: target -> source.
        stored: reads a parameter of the checkpoint; None if it has not.
    Raises:
        FormatError: two adapters that cannot be added up, or a bias that the model has not.
    """

    def __init__(self, adapters: Sequence[Adapter], tied: Mapping[str, str], stored: Callable[[str], Tensor | None]):
        self._tied = tied
        self._steps: dict[str, list[Step]] = {}
        for adapter in adapters:
            check_merge(adapter)
            for step in _steps(adapter):
                for name in self._members(step):
                    self._steps.setdefault(name, []).append(step)
        self._drop_unchanged(stored)
        for name, steps in self._steps.items():
            _check_sum(name, steps)

    def __iter__(self) -> Iterator[str]:
        return iter(self._steps)

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._steps

    def apply(self, parameter: str, weight: Tensor) -> Tensor:
        """The parameter as it is after all of them; untouched, or in f32 (f64 of a weight in f64)."""
        import torch

        steps = self._steps.get(parameter, ())
        if steps and weight.dtype != torch.float64:
            weight = weight.float()
        for step in steps:
            weight = step.apply(weight)
        return weight

    def source(self, parameter: str) -> Adapter | None:
        """An adapter that changes the parameter."""
        return self._steps[parameter][0].adapter if parameter in self._steps else None

    def parts(self, target: str) -> bool:
        """Whether a tied parameter and what it is tied to are two matrices afterwards."""
        one, other = (self._steps.get(name, []) for name in (target, self._tied[target]))
        mine, others = ([s for s in a if s not in b] for a, b in ((one, other), (other, one)))
        if not mine and not others:
            return False
        if [s.kind for s in mine] == [s.kind for s in others] == ["saved"]:  # `ensure_weight_tying`, for one
            return not same(*(s.adapter.whole[s.parameter]() for s in (*mine, *others)))
        return True

    def _members(self, step: Step) -> list[str]:
        if not step.is_shared:
            return [step.parameter]
        source = self._tied.get(step.parameter, step.parameter)
        return [source, *(target for target, other in self._tied.items() if other == source)]

    def _drop_unchanged(self, stored: Callable[[str], Tensor | None]) -> None:
        """PEFT stores the base layer of an embedding that has LoRA, trained or not."""
        copies = {id(s): s for steps in self._steps.values() for s in steps if s.is_shared and s.kind == "saved"}
        unchanged = {key for key, s in copies.items() if _is_copy(stored(s.parameter), s)}
        kept = {name: [s for s in steps if id(s) not in unchanged] for name, steps in self._steps.items()}
        self._steps = {name: steps for name, steps in kept.items() if steps}


def _steps(adapter: Adapter) -> Iterator[Step]:
    """In the order in which they are applied: new values first, then what is added, then DoRA, which scales the sum."""
    for name in sorted(adapter.whole, key=lambda name: _has_own_copy(adapter, name)):
        yield Step(adapter, whole_kind(name), name, _replaced(adapter, name), not _has_own_copy(adapter, name))
    for extra in adapter.extras:
        if extra.kind == "tokens":
            # PEFT ties the rows of an output embedding to those of the input embedding, not the other way round.
            yield Step(adapter, "tokens", extra.parameter, extra.apply, extra.parameter not in adapter.base.tied)
    for target in (*adapter.linears, *adapter.bare):
        name = target if target in adapter.base.bare else f"{target}.weight"
        yield Step(adapter, "linear", name, _added(adapter, target))
    for kind in ("embedding", "lora_bias", "dora"):
        for extra in adapter.extras:
            if extra.kind == kind:
                yield Step(adapter, kind, extra.parameter, extra.apply)


def _has_own_copy(adapter: Adapter, name: str) -> bool:
    """Whether PEFT made a copy of a parameter's module; with `ensure_weight_tying` it does of every tied one."""
    source = adapter.base.tied.get(name, name) if adapter.config.get("ensure_weight_tying") else name
    return is_saved(adapter.config, name) or is_saved(adapter.config, source)


def _replaced(adapter: Adapter, name: str) -> Callable[[Tensor], Tensor]:
    return lambda weight: adapter.whole[name]().to(weight.dtype)


def _added(adapter: Adapter, target: str) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight + adapter.read_linear(target).delta()


def _is_copy(stored: Tensor | None, step: Step) -> bool:
    return stored is not None and same(stored, step.adapter.whole[step.parameter]())


def _check_sum(name: str, steps: list[Step]) -> None:
    sources = list({id(step.adapter): step.adapter for step in steps}.values())
    replacing = next((step for step in steps if KINDS[step.kind].replaces), None)
    if replacing is not None and len(sources) > 1:
        other = next(adapter for adapter in sources if adapter is not replacing.adapter)
        raise FormatError(
            replacing.adapter.source,
            f"{KINDS[replacing.kind].title} changes {name}",
            expected="one adapter that changes it, since new values cannot be added up",
            found=f"{other.source}, which changes it as well",
            remedy="merge one of them and train or convert the other on the result",
        )


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal as numbers, whatever their types."""
    if one.shape != other.shape:
        return False
    pieces = zip(one.split(_ROWS), other.split(_ROWS), strict=True) if one.dim() else [(one, other)]
    return all(bool((a.double() == b.double()).all()) for a, b in pieces)
