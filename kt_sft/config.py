"""User settings of the expert kernels, checked once where they enter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from kt_sft.errors import ConfigError, nearest

# Accepted spellings -> weight format. Only formats whose kernels exist are listed.
METHODS = {"BF16": "BF16", "AMXBF16": "BF16"}
CPU_ACTIVATIONS = ("retain", "recompute")
ISAS = ("scalar", "avx2", "avx512")


@dataclass(frozen=True)
class KTConfig:
    """How the routed experts are held and computed.

    Args:
        method: weight format in memory: `BF16` (`AMXBF16` is another name for it).
        threads: kernel threads of this process; None: physical cores that the process may use, divided by the
            processes on this machine.
        threadpool_count: groups of threads, one per NUMA node; None: the number of NUMA nodes.
        chunk_size: tokens per native pass; bounds the activation memory.
        expert_lora: LoRA on the routed experts; None: yes when the LoRA target is `all` or names experts.
        cpu_activation: `retain` keeps the expert activations for backward, `recompute` computes them again.
        weight_path: checkpoint directory that the experts are read from; None: the model's own.
        isa: narrows the kernels to `scalar`, `avx2` or `avx512`; None: the widest that the CPU has.

    Raises:
        ConfigError: lists every fault at once.
    """

    method: str = "BF16"
    threads: int | None = None
    threadpool_count: int | None = None
    chunk_size: int = 1024
    expert_lora: bool | None = None
    cpu_activation: str = "retain"
    weight_path: str | None = None
    isa: str | None = None

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise ConfigError(faults)
        object.__setattr__(self, "method", METHODS[self.method.upper()])
        if self.weight_path is not None:
            object.__setattr__(self, "weight_path", str(self.weight_path))

    def _faults(self) -> Iterator[str]:
        if not isinstance(self.method, str) or self.method.upper() not in METHODS:
            yield _unknown("method", self.method, METHODS)
        for name, optional in (("threads", True), ("threadpool_count", True), ("chunk_size", False)):
            value = getattr(self, name)
            if value is None and optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                yield f"{name}: expected a whole number >= 1{' or nothing' if optional else ''}, found {value!r}"
        if self.expert_lora is not None and not isinstance(self.expert_lora, bool):
            yield f"expert_lora: expected true, false or nothing, found {self.expert_lora!r}"
        if self.cpu_activation not in CPU_ACTIVATIONS:
            yield _unknown("cpu_activation", self.cpu_activation, CPU_ACTIVATIONS)
        if self.weight_path is not None and not str(self.weight_path).strip():
            yield "weight_path: expected a checkpoint directory or nothing, found an empty string"
        if self.isa is not None and self.isa not in ISAS:
            yield _unknown("isa", self.isa, ISAS)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KTConfig:
        """Build from a mapping; unknown keys are faults, listed together with those of the values.

        Raises:
            ConfigError: unknown keys (with the nearest known one) and wrong values.
        """
        known = [field.name for field in fields(cls)]
        faults = [f"{key}: unknown setting; {nearest(key, known)}" for key in values if key not in known]
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
