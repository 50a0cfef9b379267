"""User settings of the expert kernels, checked once where they enter."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from kt_sft.errors import ConfigError, nearest, unknown_names

# Accepted spellings -> method. Only those whose kernels exist are listed.
METHODS = {
    "BF16": "BF16",
    "INT8": "INT8",
    "INT4": "INT4",
    "RAWINT4": "RAWINT4",
    "GGUF": "GGUF",
    "LLAMAFILE": "GGUF",
    "AMXBF16": "BF16",
    "AMXINT8": "INT8",
    "AMXINT4": "INT4",
    "MOE_INT8": "INT8",
    "MOE_INT4": "INT4",
}
INT4_GROUP_SIZES = (32, 64, 128)
EXPERT_ACTIVATIONS = ("auto", "bf16", "bfp16", "int8")
CPU_LINEARS = ("auto", "off", "bf16", "int8")
CPU_ACTIVATIONS = ("retain", "recompute")
WEIGHT_LOADS = ("auto", "mmap", "copy")
ISAS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")

# Of threads, groups of them, tokens of a pass and deferred experts: what fits into the kernels' 32-bit numbers.
_MOST_COUNT = (1 << 31) - 1
_MOST_PATH = 4096
_PATHS = ("weight_path", "weight_cache", "optimize_rule")
_CHOICES = {
    "expert_activations": EXPERT_ACTIVATIONS,
    "cpu_activation": CPU_ACTIVATIONS,
    "cpu_linear": CPU_LINEARS,
    "weight_load": WEIGHT_LOADS,
}


@dataclass(frozen=True)
class KTConfig:
    """How the routed experts are held and computed.

    A `method` is what a user asks for, here, in YAML, in rules and on command lines. `formats` are what the kernels
    hold for gate, up and down by it (`models.layout.Formats`); a source of experts turns the one into the other.

    Args:
        method: how weights are held: `BF16`, `INT8` (one scale per output channel), `INT4` (one scale per group of
            inputs), `RAWINT4` (integers and scales of a compressed-tensors INT4 checkpoint as they are stored), `GGUF`
            (the block types of a GGUF file as they are stored, docs/sources.md); `AMXBF16`, `AMXINT8`, `MOE_INT8`,
            `AMXINT4`, `MOE_INT4`, `LLAMAFILE` are other names for them.
        int4_group_size: 32, 64 or 128 weights share a scale in `INT4`; sizes need not be multiples of it. In `RAWINT4`
            it must be the checkpoint's.
        expert_activations: `bf16` multiplies bf16 activations with the weights; `bfp16` does the same, but few rows
            per expert (decoding) in block floating point, which is faster; `int8` quantises them row by row. The last
            two need integer weights and give straight-through gradients; `int8` is not for `GGUF`. `auto` is bf16 in
            training and wherever gradients are recorded, else int8 if the CPU has int8 dot instructions, or bfp16
            (docs/numerics.md: errors).
        threads: kernel threads of this process; None: physical cores that the process may use, divided by the
            processes on this machine.
        threadpool_count: groups of threads, one per NUMA node; None: the number of NUMA nodes.
        chunk_size: tokens per native pass; bounds the activation memory.
        max_deferred_experts_per_token: inference only: of a token's experts so many, those with the lowest weights, are
            computed while the model goes on, and added to the output of the next MoE layer; approximate unless 0
            (docs/operator.md: errors).
        expert_lora: LoRA on the routed experts; None: yes when the LoRA target is `all` or names experts.
        cpu_activation: `retain` keeps the expert activations for backward, `recompute` computes them again.
        weight_path: where the experts are read from: a checkpoint directory, a GGUF file (any file of a split one, or
            the directory of it) or a container (`kt-sft convert`); None: the model's own directory.
        weight_load: how a container is used: `mmap` computes in the mapped files, whose pages all processes share,
            `copy` copies them to the memory of the NUMA nodes; `auto` maps where there is one group of threads, and
            copies to several.
        weight_cache: directory of containers: the first load of a checkpoint writes one there, later ones use it; None:
            experts are packed anew at every load.
        cpu_linear: kernels for the frozen linear layers that live on the CPU: `auto` (bf16 where that is faster than
            torch), `off`, `bf16`, `int8`.
        optimize_rule: a rule file (docs/rules.md) that says which device each module goes to, and gives experts methods
            of their own; None: all experts have `method`, all else is where the loader is told to put it.
        rule_vars: values for the variables of the rule file, as a mapping or `name=value,name=value`.
        isa: narrows the kernels to `scalar`, `avx2`, `avx512`, `avx512_vnni`, `avx512_bf16`, `amx_bf16` or `amx_int8`,
            each with all before it; None: everything that the CPU has.

    Raises:
        ConfigError: lists every fault at once.
    """

    method: str = "BF16"
    int4_group_size: int = 32
    expert_activations: str = "auto"
    threads: int | None = None
    threadpool_count: int | None = None
    chunk_size: int = 1024
    max_deferred_experts_per_token: int = 0
    expert_lora: bool | None = None
    cpu_activation: str = "retain"
    weight_path: str | None = None
    weight_load: str = "auto"
    weight_cache: str | None = None
    cpu_linear: str = "auto"
    optimize_rule: str | None = None
    rule_vars: str | None = None
    isa: str | None = None

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise ConfigError(faults)
        object.__setattr__(self, "method", METHODS[self.method.upper()])
        for name in _PATHS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, str(getattr(self, name)))
        if isinstance(self.rule_vars, Mapping):
            joined = ",".join(f"{name}={value}" for name, value in self.rule_vars.items())
            object.__setattr__(self, "rule_vars", joined or None)

    @property
    def format(self) -> str:
        """What the method makes of all weights, as the kernels call it: `bf16`, `int8`, `int4` or `rawint4`.

        By GGUF each tensor keeps a type of its own, see `ExpertSource.native_formats`.
        """
        return self.method.lower()

    def _faults(self) -> Iterator[str]:
        if not isinstance(self.method, str) or self.method.upper() not in METHODS:
            yield _unknown("method", self.method, METHODS)
        elif self.expert_activations in ("bfp16", "int8") and METHODS[self.method.upper()] == "BF16":
            methods = "INT8, INT4 or RAWINT4" if self.expert_activations == "int8" else "INT8, INT4, RAWINT4 or GGUF"
            found = f"expert_activations: {self.expert_activations} needs method {methods}, found BF16"
            yield f"{found}; set one of them, or leave it auto"
        elif self.expert_activations == "int8" and METHODS[self.method.upper()] == "GGUF":
            yield "expert_activations: int8 has no kernels for the types of GGUF files; set auto, bfp16 or bf16"
        if type(self.int4_group_size) is not int or self.int4_group_size not in INT4_GROUP_SIZES:
            yield f"int4_group_size: expected one of 32, 64, 128, found {self.int4_group_size!r}"
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                yield _unknown(name, getattr(self, name), known)
        numbers = (("threads", 1, True), ("threadpool_count", 1, True), ("chunk_size", 1, False))
        for name, least, optional in (*numbers, ("max_deferred_experts_per_token", 0, False)):
            value = getattr(self, name)
            if value is None and optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                yield f"{name}: expected a whole number >= {least}{' or nothing' if optional else ''}, found {value!r}"
            elif value > _MOST_COUNT:
                yield f"{name}: expected at most {_MOST_COUNT}, found {value}"
        if self.expert_lora is not None and not isinstance(self.expert_lora, bool):
            yield f"expert_lora: expected true, false or nothing, found {self.expert_lora!r}"
        method = METHODS.get(self.method.upper()) if isinstance(self.method, str) else None
        if method in ("RAWINT4", "GGUF") and self.weight_cache is not None:
            yield f"weight_cache: containers hold bf16, int8 or int4, found method {method}; leave one of them out"
        for name in _PATHS:
            if (value := getattr(self, name)) is None:
                continue
            if not isinstance(value, str | os.PathLike) or not str(value).strip():
                found = "an empty string" if isinstance(value, str) else repr(value)
                yield f"{name}: expected a path or nothing, found {found}"
            elif "\0" in str(value) or len(str(value)) > _MOST_PATH:
                yield f"{name}: expected a path of at most {_MOST_PATH} characters without a NUL, found {str(value)!r}"
        yield from self._rule_faults()
        if self.isa is not None and self.isa not in ISAS:
            yield _unknown("isa", self.isa, ISAS)

    def _rule_faults(self) -> Iterator[str]:
        if not isinstance(self.rule_vars, str | Mapping | None):
            yield f"rule_vars: expected a mapping or name=value,name=value, found {self.rule_vars!r}"
        elif isinstance(self.rule_vars, Mapping) and (
            wrong := [name for name, value in self.rule_vars.items() if not isinstance(value, str | int | float)]
        ):
            yield f"rule_vars: {wrong[0]}: expected a text or a number, found {self.rule_vars[wrong[0]]!r}"
        elif self.rule_vars and self.optimize_rule is None:
            yield "rule_vars: variables of a rule file, but there is no optimize_rule; set it or remove rule_vars"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KTConfig:
        """Build from a mapping; unknown keys are faults, listed together with those of the values.

        Raises:
            ConfigError: unknown keys (with the nearest known one) and wrong values.
        """
        known = [field.name for field in fields(cls)]
        unknown = (key for key in values if key not in known)
        faults = unknown_names(unknown, lambda key: nearest(key, known), "unknown setting")
        try:
            config = cls(**{key: value for key, value in values.items() if key in known})
        except ConfigError as error:
            raise ConfigError([*faults, *error.faults]) from None
        if faults:
            raise ConfigError(faults)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain values, accepted by `from_dict`."""
        return asdict(self)


def _unknown(name: str, value: object, known: Mapping[str, str] | tuple[str, ...]) -> str:
    return f"{name}: expected one of {', '.join(known)}, found {value!r}; {nearest(value, known)}"
