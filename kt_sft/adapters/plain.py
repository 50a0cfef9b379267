"""What all forms in adapter directories have alike: LoRA on ordinary Linear layers and on other matrices, what DoRA and
biases add to it, embeddings, and modules trained as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from kt_sft.adapters import peft_config
from kt_sft.adapters.model import INCOMPLETE, OTHER_MODEL, PARAMETERS, Adapter, BaseModel, Extra, Lora
from kt_sft.adapters.tensor_file import PREFIX, TensorFile
from kt_sft.errors import FormatError
from kt_sft.formats.file_names import ADAPTER_CONFIG

if TYPE_CHECKING:
    from torch import Tensor

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<role>[AB])\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_[AB]")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.weight)?")
_LORA_BIAS = re.compile(r"(?P<module>.+)\.lora_B\.bias")
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
_SAVED = re.compile(r"\.modules_to_save(\.default)?(?=\.)")  # stored beside the plain name, with the same numbers


class LinearReader:
    """Finds the pairs of matrices outside the experts among the tensors that nobody else knows, and what belongs to
    them; called with a name it reads a pair.

    Args:
        known: names that belong to the experts.
        left_out: of Linear layers that the config names by their last part and that need not be there; None: all.
    Raises:
        FormatError: half a pair, another shape, a name that is no matrix of the model, or a target without its pair.
    """

    def __init__(
        self,
        tensors: TensorFile,
        config: Mapping[str, Any],
        base: BaseModel,
        known: set[str],
        left_out: Collection[str] | None = (),
    ):
        self._tensors, self._config, self._base = tensors, config, base
        self._left_out = left_out
        self._stems: dict[str, str] = {}
        self.ranks: dict[str, int] = {}
        self.scales: dict[str, float] = {}
        self.rest: list[str] = []
        self._hub = {hub: name for name, hub in base.hub_names.items()}
        self._is_target = peft_config.target_test(config)
        others: dict[str, dict[str, str]] = {}  # kind -> module -> key
        for key in tensors:
            if key in known:
                continue
            if found := _FACTOR.fullmatch(key):
                self._add(key, found["module"])
                continue
            for kind, pattern in _OTHERS.items():
                if found := pattern.fullmatch(key):
                    self._add_other(others.setdefault(kind, {}), key, found["module"])
                    break
            else:
                self.rest.append(key)
        for name, stem in self._stems.items():
            self._check(name, stem)
        self.extras: tuple[Extra, ...] = ()
        missing = [f"{name}.lora_A.weight" for name in self._targets() if name not in self._stems]
        if not base.may_grow:
            self.extras = tuple(self._extra(kind, name, key) for kind in others for name, key in others[kind].items())
            missing += self._lacking(others)
        if missing:
            raise FormatError(
                tensors.path, f"tensor {missing[0]}", expected="present", found="missing", remedy=INCOMPLETE
            )

    def _add(self, key: str, stem: str) -> None:
        """A factor of a pair."""
        target = self._target(key, stem)
        if self._stems.setdefault(target, stem) != stem:
            raise _twice(self._tensors, key, self._stems[target])

    def _add_other(self, keys: dict[str, str], key: str, stem: str) -> None:
        """A tensor of another kind; the two factors of an embedding have one name."""
        module = self._module(stem)
        if not keys.setdefault(module, key).startswith(key[:-1]):
            raise _twice(self._tensors, key, keys[module])

    def _expect_target(self, key: str, *names: str) -> None:
        """Raise where the config does not name a module, by its own name or by that of checkpoints: PEFT would leave
        its tensors alone."""
        if not any(map(self._is_target, names)):
            what, expected = f"tensor {key}", f"one of a module that {ADAPTER_CONFIG} names as a target"
            remedy = "take it out of the file, or name its module in target_modules"
            raise FormatError(self._tensors.path, what, expected=expected, found="none", remedy=remedy)

    @property
    def has_other_names(self) -> bool:
        """Whether pairs are stored under names that PEFT cannot wrap: those of checkpoints, or of routers that are no
        Linear layers any more, as adapters of transformers 4 have them."""
        parameters = [name for name in self._stems if name in self._base.bare]
        unnamed = [name for name in parameters if not peft_config.is_parameter(self._config, name)]
        return bool(unnamed) or bool(set(self._stems.values()) & set(self._hub))

    def _lacking(self, others: Mapping[str, Mapping[str, str]]) -> list[str]:
        """What the config names beside pairs and is not there: without it the adapter would compute something else."""
        pairs = [name for name in self._stems if name in self._base.linears] if self._config.get("use_dora") else []
        missing = [f"{name}.lora_magnitude_vector" for name in pairs if name not in others.get("dora", {})]
        if self._config.get("trainable_token_indices") and "tokens" not in others:
            missing.append("token_adapter.trainable_tokens_delta")
        there = {_SAVED.sub("", key) for key in self.rest}
        saved = (name for name in self._base.parameters if is_saved(self._config, name))
        return missing + [name for name in saved if not there & {name, self._hub_name(name)}]

    def _targets(self) -> Iterator[str]:
        """Linear layers whose pairs have to be there; what `all-linear` meant only PEFT knows."""
        wanted = self._config.get("target_modules")
        if self._left_out is None or not wanted or wanted == peft_config.ALL_LINEAR:
            return
        for name in self._base.linears:
            is_left_out = name.rpartition(".")[2] in self._left_out or is_saved(self._config, f"{name}.weight")
            if not is_left_out and self._is_target(name):
                yield name

    def _hub_name(self, parameter: str) -> str:
        """What checkpoints call a parameter."""
        module, _, kind = parameter.rpartition(".")
        return f"{self._base.hub_names.get(module, module)}.{kind}"

    def _module(self, stem: str) -> str:
        """The model's own name of a module."""
        stem = stem.removesuffix(".base_layer")
        is_known = stem in self._base.linears or f"{stem}.weight" in self._base.parameters
        return stem if is_known else self._hub.get(stem, stem)

    def _target(self, key: str, stem: str) -> str:
        """The Linear, or the parameter of another module, that a pair is of."""
        module = self._module(stem)
        if module in self._base.linears:
            return module
        if f"{module}.weight" in self._base.bare:
            return f"{module}.weight"
        what = f"tensor {key}"
        raise FormatError(
            self._tensors.path, what, expected="a LoRA target of the model", found="none", remedy=OTHER_MODEL
        )

    def _check(self, name: str, stem: str) -> None:
        """A pair's shapes; PEFT looks a target parameter's rank up by the parameter's name."""
        parameter = name if name in self._base.bare else f"{name}.weight"
        is_parameter = peft_config.is_parameter(self._config, parameter)
        named = parameter if is_parameter else parameter.removesuffix(".weight")
        key = f"{stem}.lora_A.weight"
        if not is_parameter:
            self._expect_target(key, named, stem)
        elif name in self._base.linears and self._config.get("target_modules") and self._is_target(name):
            raise self._fault(key, "a target that is named once", "one of target_modules and of target_parameters")
        rank = peft_config.rank_of(self._config, named)
        out, into = (self._base.bare if name in self._base.bare else self._base.linears)[name]
        for role, shape in (("A", (rank, into)), ("B", (out, rank))):
            self._expect(f"{stem}.lora_{role}.weight", shape)
        self.ranks[name], self.scales[name] = rank, peft_config.scale_of(self._config, named, rank)

    def _expect(self, key: str, shape: tuple[int, ...]) -> None:
        found = self._tensors.shape(key) if key in self._tensors else None
        if found != shape:
            shown = "missing" if found is None else list(found)
            raise FormatError(self._tensors.path, f"tensor {key}", expected=list(shape), found=shown)

    def __call__(self, name: str) -> Lora:
        stem = self._stems[name]
        a, b = (self._tensors.read(f"{stem}.lora_{role}.weight") for role in "AB")
        return Lora(a, b, self.scales[name])

    def _extra(self, kind: str, name: str, key: str) -> Extra:
        """What a tensor that belongs to a module does to it."""
        parameter = f"{name}.weight"
        shape = self._base.parameters.get(parameter)
        if shape is None or len(shape) != 2:
            what = f"tensor {key}"
            raise FormatError(
                self._tensors.path, what, expected="a matrix of the model", found="none", remedy=OTHER_MODEL
            )
        if kind == "embedding":
            return self._embedding(name, key, shape)
        if (switch := _SWITCHES.get(kind)) is not None and not self._config.get(switch):
            expected = f"none without {switch} in {ADAPTER_CONFIG}"
            raise self._fault(key, expected, "one", "set it, or take the tensor out of the file")
        read = partial(self._tensors.read, key)
        tensors = {f"{name}.{_SUFFIXES[kind]}": read}
        if kind == "tokens":
            indices = self._token_indices(key, name)
            self._expect(key, (len(indices), shape[1]))
            return Extra(kind, parameter, tensors, partial(_put_rows, indices, read))
        if kind == "dora":
            is_embedding = name not in self._base.linears
            self._expect_target(key, name, key.rpartition(".lora_")[0])
            if not is_embedding and name not in self.scales:
                raise self._fault(key, "one beside lora_A and lora_B of the module", "it alone")
            self._expect(key, (shape[1] if is_embedding else shape[0],))
            return Extra(kind, parameter, tensors, partial(_rescaled, read, 0 if is_embedding else 1))
        self._expect(key, (shape[0],))
        if name not in self.scales or self._config.get("use_dora"):
            raise FormatError(self._tensors.path, f"tensor {key}", expected="one beside plain LoRA", found="none")
        if name in self._base.routers:  # its block reads the weight alone
            raise FormatError(
                self._tensors.path, f"tensor {key}", expected="no bias on a router", found="one (lora_bias)",
                remedy="take it out of the file if it is zero, or train without lora_bias",
            )  # fmt: skip
        scale = self.scales[name]
        return Extra(kind, f"{name}.bias", tensors, lambda bias: bias + scale * read().to(bias.dtype))

    def _embedding(self, name: str, key: str, shape: tuple[int, ...]) -> Extra:
        """W `[tokens, hidden]` + scale * (B A)^T with A `[rank, tokens]` and B `[hidden, rank]`."""
        stem = key[:-1]
        self._expect_target(key, name)
        rank = peft_config.rank_of(self._config, name)
        self._expect(f"{stem}A", (rank, shape[0]))
        self._expect(f"{stem}B", (shape[1], rank))
        scale = peft_config.scale_of(self._config, name, rank)
        a, b = (partial(self._tensors.read, f"{stem}{role}") for role in "AB")
        tensors = {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}

        def apply(weight: Tensor) -> Tensor:
            return weight + Lora(b().mT, a().mT, scale).delta()  # a row for each token, so the roles are exchanged

        return Extra("embedding", f"{name}.weight", tensors, apply)

    def _token_indices(self, key: str, name: str) -> list[int]:
        given = self._config.get("trainable_token_indices")
        by_module = given if isinstance(given, dict) else {name: given}
        found = next((value for entry, value in by_module.items() if name.endswith(entry)), None)
        size = self._base.parameters[f"{name}.weight"][0]
        is_good = isinstance(found, list) and all(isinstance(n, int) and 0 <= n < size for n in found)
        if not is_good or len(set(found)) != len(found):
            what, expected = f"tensor {key}", f"trainable_token_indices of {name}, different rows below {size}"
            raise FormatError(self._tensors.path, what, expected=expected, found=repr(found)[:80])
        return found

    def whole(self) -> dict[str, Callable[[], Tensor]]:
        """Modules trained as a whole: what is left over, which must be parameters or buffers of the model; nothing
        where its vocabulary may still become another one.

        Raises:
            FormatError: something else; no parameter of the model, one of another shape, or one that the config does
                not name.
        """
        found: dict[str, Callable[[], Tensor]] = {}
        by_hub_name = {f"{hub}.weight": f"{name}.weight" for hub, name in self._hub.items()}
        for key in self.rest if not self._base.may_grow else ():
            if ".lora_" in key or ".token_adapter." in key:
                raise self._fault(key, "lora_A and lora_B of plain LoRA", "something else")
            if ".original_module." in key:
                continue  # the frozen one, which PEFT stores beside its trained copy once the vocabulary has grown
            name = _SAVED.sub("", key).replace(".base_layer.", ".")
            name = name if name in self._base.parameters else by_hub_name.get(name, name)
            self._check_whole(key, name)
            found[name] = partial(self._tensors.read, key)
        return found

    def _check_whole(self, key: str, name: str) -> None:
        module, _, parameter = name.rpartition(".")
        if module in self._base.specs and parameter in PARAMETERS:
            raise self._fault(
                key, "LoRA on the routed experts", "routed experts that were trained as a whole (modules_to_save)",
                "merge it with stock PEFT and use the result as the model",
            )  # fmt: skip
        shape = self._base.parameters.get(name)
        if shape is None:
            raise self._fault(key, "a parameter of the model", "none", OTHER_MODEL)
        if self._tensors.shape(key) != shape:
            remedy = "name the model that it was trained on, with the vocabulary of that time"
            raise self._fault(key, list(shape), list(self._tensors.shape(key)), remedy)
        # PEFT stores the whole weight of an embedding or head that has LoRA, or whose vocabulary has grown.
        is_vocabulary = len(shape) == 2 and shape[0] == self._base.config.get("vocab_size")
        is_bias = "bias" in key and self._config.get("bias", "none") != "none"
        if not (is_vocabulary or is_bias or is_saved(self._config, name) or is_saved(self._config, key)):
            expected = f"one that {ADAPTER_CONFIG} names (modules_to_save, bias)"
            remedy = "take it out of the file, or name its module"
            raise self._fault(key, expected, "a weight of the base model", remedy)

    def _fault(self, key: str, expected: object, found: object, remedy: str = "") -> FormatError:
        return FormatError(self._tensors.path, f"tensor {key}", expected=expected, found=found, remedy=remedy)


_SUFFIXES = {
    "dora": "lora_magnitude_vector",
    "lora_bias": "lora_B.bias",
    "tokens": "token_adapter.trainable_tokens_delta",
}
_SWITCHES = {"dora": "use_dora", "lora_bias": "lora_bias"}
_OTHERS = {"embedding": _EMBEDDING, "dora": _MAGNITUDE, "lora_bias": _LORA_BIAS, "tokens": _TOKENS}


def _put_rows(indices: list[int], read: Callable[[], Tensor], weight: Tensor) -> Tensor:
    """`weight` with new rows."""
    weight = weight.clone()
    weight[indices] = read().to(weight.dtype)
    return weight


def _rescaled(read: Callable[[], Tensor], axis: int, weight: Tensor) -> Tensor:
    """DoRA: every row (axis 1), or column of an embedding (axis 0), at a length of its own."""
    magnitude = read().to(weight.dtype).unsqueeze(axis)
    return weight * (magnitude / weight.norm(dim=axis, keepdim=True))


def is_saved(config: Mapping[str, Any], parameter: str) -> bool:
    """Whether a parameter is of a module in modules_to_save, which PEFT copies: no other module has that copy."""
    module, parents = parameter.rpartition(".")[0], []
    while module:
        parents.append(module)
        module = module.rpartition(".")[0]
    return any(parent.endswith(entry) for parent in parents for entry in config.get("modules_to_save") or [])


def _twice(tensors: TensorFile, key: str, other: str) -> FormatError:
    return FormatError(
        tensors.path, f"tensor {key}", expected="one of a module", found=f"{other}, too, which means the same"
    )


def linear_tensors(
    adapter: Adapter, ranks: Mapping[str, int], scales: Mapping[str, float], names: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The pairs outside the experts at the given ranks and scales, under other names where `names` has some."""
    for name in (*adapter.linears, *adapter.bare):
        lora = adapter.read_linear(name).fitted(ranks[name], scales[name])
        module = name.removesuffix(".weight") if name in adapter.base.bare else name
        stem = f"{PREFIX}{(names or {}).get(module, module)}.lora_"
        yield f"{stem}A.weight", lora.a
        yield f"{stem}B.weight", lora.b


def whole_tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Modules trained as a whole, PEFT keeps the weight of one that has LoRA, too, in its base layer; and extras."""
    has_pairs = {*adapter.ranks, *(name.removesuffix(".weight") for name in adapter.bare)}
    has_pairs |= {e.parameter.rpartition(".")[0] for e in adapter.extras if e.kind == "embedding"}
    for name, read in adapter.whole.items():
        module, _, kind = name.rpartition(".")
        yield f"{PREFIX}{module}{'.base_layer' if module in has_pairs else ''}.{kind}", read()
    for extra in adapter.extras:
        for key, read in extra.tensors.items():
            yield f"{PREFIX}{key}", read()
