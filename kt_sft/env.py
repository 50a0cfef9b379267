"""Every environment variable that the package reads, and the only place that reads them. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from kt_sft.errors import ConfigError


@dataclass(frozen=True)
class Variable:
    """One variable: `doc` is shown by `kt-sft doctor`."""

    name: str
    doc: str
    owner: str = "kt_sft"


VARIABLES: tuple[Variable, ...] = (
    Variable("USE_KT", "1 installs the LLaMA-Factory hook; unset or 0 leaves LLaMA-Factory untouched"),
    Variable("KT_SFT_ISA", "narrows the kernels: scalar, avx2, avx512, ..., amx_int8; overrides KTConfig.isa"),
    Variable("KT_SFT_THREADS", "number of kernel threads in this process; overrides KTConfig.threads"),
    Variable("KT_SFT_TRACEBACK", "1 shows the traceback of an error instead of its one-line message"),
    Variable("KT_SFT_API_KEY", "key of `kt-sft serve`, and of the server that `kt-sft bench serve` measures"),
    Variable("TORCH_DEVICE_BACKEND_AUTOLOAD", "0 keeps torch from loading entry points, and so our hook", "torch"),
    Variable("OMP_WAIT_POLICY", "what idle threads of torch's OpenMP do; unset: we have them sleep", "OpenMP"),
    Variable("GOMP_SPINCOUNT", "how long idle threads of torch's OpenMP spin; unset: as OMP_WAIT_POLICY", "libgomp"),
    Variable("LOCAL_RANK", "rank of this process on this machine", "torchrun"),
    Variable("LOCAL_WORLD_SIZE", "processes on this machine; they share cores and memory", "torchrun"),
)
_NAMES = frozenset(variable.name for variable in VARIABLES)


def read(name: str, environ: Mapping[str, str] | None = None) -> str | None:
    """Value of a variable of the table; empty counts as unset."""
    if name not in _NAMES:
        raise KeyError(f"{name} is not in the table of kt_sft/env.py; add it there first")
    value = (os.environ if environ is None else environ).get(name)
    return value.strip() or None if value is not None else None


def use_kt() -> bool:
    """Whether the user asked for the LLaMA-Factory hook; the accepted words are those of LLaMA-Factory itself."""
    return (read("USE_KT") or "").lower() in {"1", "true", "y"}


def device_autoload() -> bool:
    """Whether torch loads its entry points, ours among them."""
    return (read("TORCH_DEVICE_BACKEND_AUTOLOAD") or "1") == "1"


def openmp_waits() -> bool:
    """Whether the user has said how torch's idle OpenMP threads wait: then that is how they do."""
    return read("OMP_WAIT_POLICY") is not None or read("GOMP_SPINCOUNT") is not None


def traceback() -> bool:
    """Whether the user wants Python's traceback under the one-line message of an error."""
    return (read("KT_SFT_TRACEBACK") or "").lower() in {"1", "true", "y"}


def api_key() -> str | None:
    """Key of the server as it is written, also where it is empty; None: the variable is not set."""
    return os.environ.get("KT_SFT_API_KEY")


def isa() -> str | None:
    """Kernel level that the user narrows to, lower case; None leaves the choice to the configuration."""
    value = read("KT_SFT_ISA")
    return value.lower() if value else None


def threads() -> int | None:
    """Kernel threads that the user asks for; None leaves the choice to the configuration."""
    return _positive("KT_SFT_THREADS")


def local_world_size() -> int:
    """Processes of this job on this machine, 1 without a launcher."""
    return _positive("LOCAL_WORLD_SIZE") or 1


def local_rank() -> int:
    """Rank of this process on this machine, 0 without a launcher."""
    value = read("LOCAL_RANK")
    return int(value) if value and value.isdigit() else 0


def _positive(name: str) -> int | None:
    value = read(name)
    if value is None:
        return None
    if not value.isdigit() or int(value) < 1:
        raise ConfigError(
            f"environment variable {name}: expected a whole number >= 1, found {value!r}; correct or unset it"
        )
    return int(value)
