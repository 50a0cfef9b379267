"""The limits of this machine, probed in milliseconds: rates of its compute units and DRAM read bandwidth.

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
# Compute units in the order of probes.cc; the int8 units without a dot instruction multiply 16-bit pairs (vpmaddwd).
UNITS = (
    "fma_avx2",
    "fma_avx512",
    "int8_avx2",
    "int8_avx512",
    "int8_vnni",
    "bf16_avx512",
    "bf16_amx",
    "int8_amx",
)
# The unit that a kernel row's products run on, by (rows, isa); levels that add no unit use that of the level below.
_UNIT_OF = {
    ("bf16", "scalar"): "fma_avx2",
    ("bf16", "avx2"): "fma_avx2",
    ("bf16", "avx512"): "fma_avx512",
    ("bf16", "avx512_bf16"): "bf16_avx512",
    ("bf16", "amx_bf16"): "bf16_amx",
    ("int8", "scalar"): "int8_avx2",
    ("int8", "avx2"): "int8_avx2",
    ("int8", "avx512"): "int8_avx512",
    ("int8", "avx512_vnni"): "int8_vnni",
    ("int8", "amx_int8"): "int8_amx",
}
ISAS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
MIN_BUFFER_BYTES = 256 << 20
MAX_READ_BYTES = 512 << 20


@dataclass(frozen=True)
class Limits:
    """What the machine could do at one moment, with the number of threads that the benchmark uses."""

    fma_flops: float  # f32 FLOP/s, a multiply-add counts 2
    dram_bytes: float  # bytes read per second
    unit_ops: float = 0.0  # operations/s of the compute unit that the caller named, a multiply-add counts 2


def unit_of(rows: str, isa: str) -> str:
    """Compute unit whose peak bounds a kernel row: `rows` and `isa` as `kernel_rows()` names them."""
    rows = "int8" if rows == "bfp16" else rows  # products of int16 pairs
    levels = ISAS[: ISAS.index(isa) + 1]
    return next(_UNIT_OF[rows, level] for level in reversed(levels) if (rows, level) in _UNIT_OF)


def fma_unit(isa: str) -> str:
    """The f32 FMA unit of an ISA level."""
    return "fma_avx512" if ISAS.index(isa) >= ISAS.index("avx512") else "fma_avx2"


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
    library.kts_probe_has.argtypes = [ctypes.c_int]
    library.kts_probe_ops_per_round.argtypes = [ctypes.c_int]
    library.kts_probe_ops_per_round.restype = ctypes.c_double
    library.kts_probe_unit.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    library.kts_probe_unit.restype = ctypes.c_double
    library.kts_probe_buffer.argtypes = [ctypes.c_size_t, ctypes.c_int]
    library.kts_probe_buffer.restype = ctypes.c_void_p
    library.kts_probe_dram.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.kts_probe_dram.restype = ctypes.c_double
    return library


def units() -> list[str]:
    """Compute units of this CPU."""
    return [name for index, name in enumerate(UNITS) if _library().kts_probe_has(index)]


class Roofline:
    """Probes for kernels of one ISA level at one thread count.

    The DRAM probe reads twice the last-level cache (at most 512 MiB), so after `probe()` no weights are left in cache:
    it is the flush between samples as well.
    """

    def __init__(self, isa: str, threads: int, *, unit_seconds: float = 0.003) -> None:
        self.isa, self.threads = isa, threads
        self._unit_seconds = unit_seconds
        self._rounds: dict[str, int] = {}
        read_bytes = min(2 * last_level_cache_bytes(), MAX_READ_BYTES)
        self._slice_bytes = -(-read_bytes // (2 << 20)) * (2 << 20)
        self._num_slices = max(2, -(-MIN_BUFFER_BYTES // self._slice_bytes))
        self._next_slice = 0
        self.unit_rate(fma_unit(isa))
        self._buffer = _library().kts_probe_buffer(self._slice_bytes * self._num_slices, threads)
        if not self._buffer:
            mebibytes = self._slice_bytes * self._num_slices >> 20
            raise MemoryError(f"roofline probes: {mebibytes} MiB for the DRAM probe not available; free some memory")

    def unit_rate(self, unit: str, threads: int | None = None) -> float:
        """Operations per second of a compute unit now.

        Raises:
            RuntimeError: this CPU has no such unit.
        """
        index, threads = UNITS.index(unit), threads or self.threads
        if unit not in self._rounds:
            if unit not in units():
                raise RuntimeError(
                    f"roofline probes: this CPU has no unit {unit!r}, only {units()}; pass another --isa"
                )
            trial_rounds = 20_000
            rate = max(_library().kts_probe_unit(index, 1, trial_rounds) for _ in range(3))
            rounds = int(self._unit_seconds * rate / _library().kts_probe_ops_per_round(index))
            self._rounds[unit] = max(trial_rounds, rounds)
        return _library().kts_probe_unit(index, threads, self._rounds[unit])

    def probe(self, threads: int | None = None, unit: str = "") -> Limits:
        """The limits now, with `threads` threads (default: the benchmark's); `unit`: probe this one as well."""
        threads = threads or self.threads
        start = self._buffer + self._slice_bytes * self._next_slice
        self._next_slice = (self._next_slice + 1) % self._num_slices
        dram = _library().kts_probe_dram(start, self._slice_bytes, threads)
        fma = self.unit_rate(fma_unit(self.isa), threads)
        if not unit:
            return Limits(fma, dram)
        return Limits(fma, dram, fma if unit == fma_unit(self.isa) else self.unit_rate(unit, threads))

    def ceilings(self, threads: int) -> dict[str, float]:
        """Every limit of this CPU by name, for the record: the best of three probes."""
        every = {unit: max(self.unit_rate(unit, threads) for _ in range(3)) for unit in units()}
        return every | {"dram_bytes": max(self.probe(threads).dram_bytes for _ in range(3))}
