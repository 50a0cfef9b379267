"""Block types of GGUF files against ggml: `python -m benchmarks.bench_blocks --ggml FOLDER`.

One expert-sized product per type and number of rows, ours and ggml's in turn on the same blocks and activations; copies
of the weights are used in turn, so that few rows read memory. Compare with --threads 1: without a thread pool of the
caller's ggml starts its threads anew for each product. FOLDER: the libraries of `pip download --no-deps
libggml-python==0.20.2`, unpacked (libggml/lib64); default: the variable GGML_LIBRARIES.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.table import Table

from benchmarks import session
from benchmarks.problem import worst_error
from benchmarks.worker import Worker
from tests.helpers.blocks import BLOCKS, random_rows

VARIABLE = "GGML_LIBRARIES"
N, K = 1408, 2048  # gate of DeepSeek-V2-Lite
ROWS = (1, 4, 16, 64, 512)
COPIES = 24
ROUNDS = 15
MAX_ERROR = 4e-3


@dataclass
class BlockCase:
    """One type with m rows: medians of rounds in which both ran."""

    type: str
    n: int
    k: int
    m: int
    threads: int
    dram_fraction: float
    fma_fraction: float
    error: float
    ggml_ratio: float | None  # time of ggml / ours
    ggml_error: float | None


class BlockBench:
    """All row counts of one type."""

    def __init__(self, running: session.Session, ggml: Worker | None, folder: Path, name: str):
        self.running, self.ggml, self.folder, self.name = running, ggml, folder, name
        generator = torch.Generator().manual_seed(0)
        self.blocks = random_rows(name, N, K, generator, size=K**-0.5)
        (folder / "w").write_bytes(self.blocks.numpy().tobytes())
        self.copies = [running.library.PackedLinear(N, K, name) for _ in range(COPIES)]
        for copy in self.copies:
            copy.load_blocks(self.blocks)
        self.stored = torch.empty(N, K)
        self.copies[0].unpack(self.stored, "f32")

    def run(self, m: int, rows: str) -> BlockCase:
        """Times m rows, of the kind that inference takes."""
        a, out = torch.randn(m, K).bfloat16(), torch.empty(m, N)
        passes, threads = (COPIES if m <= 16 else 2), self.running.threads
        truth = a.double() @ self.stored.double().T
        ggml_error = self._load_ggml(a, m, passes, truth)
        ours, dram, fma, ratios = [], [], [], []
        for _ in range(ROUNDS):
            limits = self.running.roofline.probe(threads, "")
            start = time.perf_counter()
            for copy in self.copies[:passes]:
                copy.forward(a, out, "f32", rows=rows)
            seconds = (time.perf_counter() - start) / passes
            ours.append(seconds)
            dram.append(self.blocks.numel() / seconds / limits.dram_bytes)
            fma.append(2.0 * m * N * K / seconds / limits.fma_flops)
            if self.ggml is not None:
                ratios.append(self.ggml.ask(run=passes)["seconds"] / passes / seconds)
        error = worst_error([out], [truth.float()])
        if not error <= MAX_ERROR:
            raise RuntimeError(f"{self.name}: relative error {error:.3g} with {m} rows; mend it first")
        ratio = median(ratios) if ratios else None
        return BlockCase(self.name, N, K, m, threads, median(dram), median(fma), error, ratio, ggml_error)

    def _load_ggml(self, a: torch.Tensor, m: int, copies: int, truth: torch.Tensor) -> float | None:
        if self.ggml is None:
            return None
        (self.folder / "x").write_bytes(a.float().numpy().tobytes())
        files = {"file": "w", "rows": "x", "result": "y"}
        paths = {key: str(self.folder / name) for key, name in files.items()}
        self.ggml.ask(load=self.name, n=N, k=K, m=m, copies=copies, threads=self.running.threads, **paths)
        y = torch.frombuffer(bytearray((self.folder / "y").read_bytes()), dtype=torch.float32).reshape(m, N)
        return worst_error([y], [truth.float()])


def table_of(cases: list[BlockCase]) -> Table:
    """One line per type and rows."""
    table = Table("type", "rows", "of DRAM", "of FMA", "error", "ggml's time / ours", "ggml's error")
    for one in cases:
        ratio = "-" if one.ggml_ratio is None else f"{one.ggml_ratio:.2f} x"
        other = "-" if one.ggml_error is None else f"{one.ggml_error:.1e}"
        fractions = f"{one.dram_fraction:.0%}", f"{one.fma_fraction:.0%}"
        table.add_row(one.type, str(one.m), *fractions, f"{one.error:.1e}", ratio, other)
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", default=os.environ.get(VARIABLE, ""), metavar="FOLDER", help="ggml's libraries")
    parser.add_argument("--types", nargs="+", default=list(BLOCKS), choices=list(BLOCKS), metavar="TYPE")
    session.add_options(parser)
    options = parser.parse_args(arguments)
    running = session.open_session(options, "blocks", "full")
    ggml = Worker("ggml_worker", Path(options.ggml).resolve()) if options.ggml else None
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.types:
            bench = BlockBench(running, ggml, Path(folder), name)
            rows = running.library.default_rows(name)
            cases += [bench.run(m, rows) for m in ROWS]
    if ggml is not None:
        ggml.close()
    running.console.print(table_of(cases))
    running.save(cases)
    return 0


if __name__ == "__main__":
    sys.exit(main())
