"""Kernel level and threads of this process, from the environment, the configuration and the machine."""

from __future__ import annotations

import functools
import logging

from kt_sft import env
from kt_sft.config import ISAS, KTConfig
from kt_sft.errors import ConfigError, UnsupportedHardware, nearest
from kt_sft.native import native

logger = logging.getLogger(__name__)


def prepare_native(config: KTConfig) -> None:
    """Set kernel level and threads of this process from the environment and the configuration.

    Raises:
        UnsupportedHardware: the CPU lacks AVX2 (unless `isa="scalar"` is asked for) or the level asked for.
    """
    library = native()
    isa = env.isa() or config.isa
    detected = library.isa_detected()
    if isa is not None:
        if isa not in ISAS:
            raise ConfigError(f"KT_SFT_ISA: expected one of {', '.join(ISAS)}, found {isa!r}; {nearest(isa, ISAS)}")
        if isa not in detected:
            reason = f"{library.amx_refusal()}; " if isa.startswith("amx") and library.amx_refusal() else ""
            raise UnsupportedHardware(
                "kernel level",
                needed=isa,
                found=", ".join(detected),
                remedy=f"{reason}unset isa to use the widest that the CPU has",
            )
        library.set_isa(isa)
    elif "avx2" not in detected:
        raise UnsupportedHardware(
            "CPU",
            needed="AVX2",
            found=", ".join(detected),
            remedy="use another machine; isa='scalar' runs reference kernels that are for tests only",
        )
    threads = env.threads() or config.threads or max(1, library.default_threads() // env.local_world_size())
    info = library.cpu_info()
    threads = _at_most("threads", threads, info["logical_cpus"], "this process may use {} CPUs")
    nodes = len(info["numa_nodes"]) or 1
    pools = config.threadpool_count or nodes
    pools = _at_most("threadpool_count", pools, nodes, "this process may use {} NUMA nodes")
    library.set_threads(threads, min(pools, threads))


def _at_most(name: str, asked: int, most: int, reason: str) -> int:
    if asked <= most:
        return asked
    _say_once(f"{name}: {asked} asked for, but {reason.format(most)}; using {most}")
    return most


@functools.cache
def _say_once(message: str) -> None:
    """A process prepares several times: for the checks of a run, and for each model."""
    logger.warning(message)
