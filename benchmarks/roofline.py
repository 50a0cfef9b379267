"""The two limits of this machine, probed in milliseconds: f32 FMA rate and DRAM read bandwidth.

A rate in GFLOP/s says little on a shared or virtual machine, whose peak moves by half within a minute; so the harness
takes a probe on either side of every sample and reports the fraction of what the machine could do at that moment.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(__file__).with_name("probes.cc")
COMPILE_FLAGS = ("-O2", "-std=c++17", "-shared", "-fPIC", "-pthread")
LEVELS = {"avx2": 1, "avx512": 2}
MIN_BUFFER_BYTES = 256 << 20
MAX_READ_BYTES = 512 << 20


@dataclass(frozen=True)
class Limits:
    """What the machine could do at one moment, with the number of threads that the benchmark uses."""

    fma_flops: float  # f32 FLOP/s, a multiply-add counts 2
    dram_bytes: float  # bytes read per second


def build_probes(out_dir: Path = ROOT / "build" / "bench") -> Path:
    """Compile probes.cc unless a library of the same source, flags and compiler is there.

    Raises:
        RuntimeError: no C++ compiler, or it failed.
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("roofline probes: expected a C++ compiler, found neither g++ nor c++; install g++")
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join((compiler, *COMPILE_FLAGS)).encode()).hexdigest()[:12]
    library = out_dir / f"libprobes-{key}.so"
    if not library.exists():
        out_dir.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(".partial")
        done = subprocess.run(
            [compiler, *COMPILE_FLAGS, str(SOURCE), "-o", str(partial)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"roofline probes: {compiler} failed on {SOURCE.name}:\n{done.stderr}")
        partial.replace(library)
    return library


def last_level_cache_bytes() -> int:
    """Bytes of last-level cache over all CPUs, each shared cache counted once; 32 MiB where the system does not say."""
    caches: dict[str, int] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        try:
            size = (index / "size").read_text().strip()
            sharers = (index / "shared_cpu_list").read_text().strip()
        except OSError:
            continue
        caches[sharers] = int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1], 0)
    return sum(caches.values()) or 32 << 20


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build_probes()))
    library.kts_probe_level.restype = ctypes.c_int
    library.kts_probe_fma.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    library.kts_probe_fma.restype = ctypes.c_double
    library.kts_probe_buffer.argtypes = [ctypes.c_size_t, ctypes.c_int]
    library.kts_probe_buffer.restype = ctypes.c_void_p
    library.kts_probe_dram.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.kts_probe_dram.restype = ctypes.c_double
    return library


def isas() -> list[str]:
    """ISAs whose FMA peak this CPU can show, narrowest first."""
    return [name for name, level in LEVELS.items() if level <= _library().kts_probe_level()]


class Roofline:
    """Probes of one ISA at one thread count.

    The DRAM probe reads twice the last-level cache (at most 512 MiB), so after `probe()` no weights are left in cache:
    it is the flush between samples as well.
    """

    def __init__(self, isa: str, threads: int, *, fma_seconds: float = 0.003) -> None:
        if isa not in isas():
            raise RuntimeError(f"roofline probes: isa {isa!r} expected one of {isas()} on this CPU; pass another --isa")
        self.isa, self.threads = isa, threads
        self._level = LEVELS[isa]
        read_bytes = min(2 * last_level_cache_bytes(), MAX_READ_BYTES)
        self._slice_bytes = -(-read_bytes // (2 << 20)) * (2 << 20)
        self._num_slices = max(2, -(-MIN_BUFFER_BYTES // self._slice_bytes))
        self._next_slice = 0
        self._buffer = _library().kts_probe_buffer(self._slice_bytes * self._num_slices, threads)
        if not self._buffer:
            mebibytes = self._slice_bytes * self._num_slices >> 20
            raise MemoryError(f"roofline probes: {mebibytes} MiB for the DRAM probe not available; free some memory")
        trial_rounds = 100_000
        flops_per_round = threads * 2 * 12 * (16 if self._level == 2 else 8)
        rate = max(self._fma(threads, trial_rounds) for _ in range(3))
        self._rounds = max(trial_rounds, int(fma_seconds * rate / flops_per_round))

    def _fma(self, threads: int, rounds: int) -> float:
        return _library().kts_probe_fma(self._level, threads, rounds)

    def probe(self, threads: int | None = None) -> Limits:
        """Both limits now, with `threads` threads (default: the benchmark's)."""
        threads = threads or self.threads
        start = self._buffer + self._slice_bytes * self._next_slice
        self._next_slice = (self._next_slice + 1) % self._num_slices
        dram = _library().kts_probe_dram(start, self._slice_bytes, threads)
        return Limits(self._fma(threads, self._rounds), dram)
