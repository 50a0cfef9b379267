"""Timing of single products on packed weights, per row of the kernel table, with cold weights."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch

from benchmarks import harness
from benchmarks.contest import MODELS
from benchmarks.harness import Contender, Sample, Work
from benchmarks.problem import worst_error
from benchmarks.roofline import Roofline, unit_of

ROWS_PER_EXPERT = (1, 2, 4, 8, 16, 32, 64, 128, 512)
COPIES = 2  # of one matrix: the probe between samples empties the cache, so that each is met cold
MANY_COPIES_UP_TO = 16  # rows: with more, one product takes long enough to be timed alone
MAX_ERROR = {"bf16": 1e-2, "bfp16": 1e-2, "int8": 3e-2}  # by rows, against float64 with the stored weights


@dataclass(frozen=True)
class MatrixShape:
    """A projection of one expert as a torch Linear weight [n, k]."""

    model: str
    projection: str
    n: int
    k: int


def shapes_of(models: Iterable[str]) -> list[MatrixShape]:
    shapes = []
    for one in (MODELS[name].whole for name in models):
        shapes.append(MatrixShape(one.model, "gate", one.inter, one.hidden))
        shapes.append(MatrixShape(one.model, "down", one.hidden, one.inter))
    return shapes


@dataclass(frozen=True)
class Kernel:
    """One row of the kernel table, or (name "") whatever is selected."""

    name: str
    op: str  # forward or input_grad
    format: str
    rows: str
    isa: str
    max_m: int

    @property
    def label(self) -> str:
        return self.name or f"{self.op} {self.format}"


def available_kernels(library: ModuleType, *, scalar: bool = False) -> list[Kernel]:
    """Rows of the table that this CPU can run, narrowed by `set_isa`."""
    names = library.isa_detected()
    allowed = names[: names.index(library.isa_active()) + 1] if library.isa_active() in names else names
    return [
        Kernel(row["name"], row["op"], row["format"], row["rows"], row["isa"], row.get("max_m", 0))
        for row in library.kernel_rows()
        if row["available"] and row["isa"] in allowed and (scalar or row["isa"] != "scalar")
    ]


@dataclass
class GemmCase:
    """One kernel row on one matrix with m rows: for the record."""

    model: str
    projection: str
    n: int
    k: int
    m: int
    threads: int
    kernel: str
    op: str
    format: str
    rows: str
    isa: str
    unit: str
    samples: int
    median_us: float
    p20_us: float
    p80_us: float
    gflops: float
    unit_fraction: float
    dram_fraction: float
    probe_unit_gops: float
    probe_dram_gbs: float
    ratio_to_forward: float | None  # rate of an input gradient / rate of the forward row beside it
    error: float


class PackedMatrices:
    """Copies of one packed matrix, used in turn, so that a product never finds its weights in cache."""

    def __init__(self, library: ModuleType, shape: MatrixShape, weight_format: str) -> None:
        self.shape = shape
        rng = torch.Generator().manual_seed(0)
        weight = (torch.randn(shape.n, shape.k, generator=rng) * shape.k**-0.5).bfloat16()
        first = self._packed(library, weight_format, weight)
        self.packed_bytes = first.packed_bytes
        self.copies = [first, *(self._packed(library, weight_format, weight) for _ in range(COPIES - 1))]
        self.stored = torch.empty(shape.n, shape.k)
        first.unpack(self.stored, dtype="f32")

    def _packed(self, library: ModuleType, weight_format: str, weight: torch.Tensor) -> object:
        packed = library.PackedLinear(self.shape.n, self.shape.k, weight_format)
        packed.load(weight)
        return packed


class Product:
    """One kernel on one matrix: what is timed."""

    def __init__(self, matrices: PackedMatrices, kernel: Kernel, m: int) -> None:
        self.kernel, self.m = kernel, m
        self._matrices = matrices
        shape = matrices.shape
        inner, outer = (shape.k, shape.n) if kernel.op == "forward" else (shape.n, shape.k)
        rng = torch.Generator().manual_seed(1)
        self._a = torch.randn(m, inner, generator=rng).bfloat16()
        self._out = torch.empty(m, outer)
        self._passes = len(matrices.copies) if m <= MANY_COPIES_UP_TO else 1

    @property
    def work(self) -> Work:
        shape = self._matrices.shape
        flops = 2.0 * self.m * shape.n * shape.k
        return Work(self._passes * flops, self._passes * self._matrices.packed_bytes)

    def seconds_each(self, seconds: float) -> float:
        """Seconds of one product, from those of one run."""
        return seconds / self._passes

    def run(self, index: int) -> None:
        """A product with every copy, or with one of many rows, with one copy."""
        copies = self._matrices.copies
        for one in copies if self._passes > 1 else (copies[index % len(copies)],):
            if self.kernel.op == "forward":
                one.forward(self._a, self._out, out_dtype="f32", rows=self.kernel.rows, kernel=self.kernel.name)
            else:
                one.input_grad(self._a, self._out, out_dtype="f32", kernel=self.kernel.name)

    def check(self) -> float:
        """Relative error of the answer.

        Raises:
            RuntimeError: it is wrong.
        """
        self.run(0)
        stored = self._matrices.stored
        expected = self._a.float() @ (stored.T if self.kernel.op == "forward" else stored)
        error = worst_error([self._out], [expected])
        if not error <= MAX_ERROR[self.kernel.rows]:
            raise RuntimeError(f"{self.kernel.label}: relative error {error:.3g} with {self.m} rows; mend it first")
        return error


def time_products(
    products: Sequence[Product], roofline: Roofline, unit: str, *, threads: int, most: int, budget: float
) -> dict[str, list[Sample]]:
    """Samples by kernel label, all products in the same rounds."""
    contenders = []
    for one in products:
        start = time.perf_counter()
        one.run(0)
        contenders.append(Contender(one.kernel.label, one.run, time.perf_counter() - start))
    counts = harness.plan_samples([one.estimate_seconds for one in contenders], budget, most=most, least=3)
    return harness.run_interleaved(contenders, partial(roofline.probe, threads, unit), counts, warmups=0)


def run_shape(
    matrices: dict[str, PackedMatrices],
    kernels: Sequence[Kernel],
    roofline: Roofline,
    m: int,
    *,
    threads: int,
    most: int,
    budget: float,
) -> list[GemmCase]:
    """All kernels on one matrix with m rows; those that share a compute unit run in the same rounds."""
    cases = []
    fitting = [one for one in kernels if not one.max_m or m <= one.max_m]
    for unit in dict.fromkeys(unit_of(one.rows, one.isa) for one in fitting):
        group = [one for one in fitting if unit_of(one.rows, one.isa) == unit]
        products = {one.label: Product(matrices[one.format], one, m) for one in group}
        errors = {label: one.check() for label, one in products.items()}
        samples = time_products(
            list(products.values()), roofline, unit, threads=threads, most=most, budget=budget * len(group)
        )
        for label, product in products.items():
            forward = _forward_beside(product.kernel, group, samples)
            ratio = harness.time_ratio(samples[forward], samples[label]) if forward else None
            cases.append(_case(matrices, product, samples[label], unit, threads, ratio, errors[label]))
    return cases


def _forward_beside(kernel: Kernel, group: Sequence[Kernel], samples: dict[str, list[Sample]]) -> str:
    """The fastest forward row of an input gradient's format and level; empty for a forward row."""
    if kernel.op == "forward":
        return ""
    wanted = ("forward", kernel.format, kernel.rows, kernel.isa)  # the rows that training takes
    alike = [one.label for one in group if (one.op, one.format, one.rows, one.isa) == wanted]
    return min(alike, key=lambda label: harness.quantile([one.seconds for one in samples[label]], 0.5), default="")


def _case(
    matrices: dict[str, PackedMatrices],
    product: Product,
    samples: Sequence[Sample],
    unit: str,
    threads: int,
    ratio: float | None,
    error: float,
) -> GemmCase:
    kernel, work = product.kernel, product.work
    shape = matrices[kernel.format].shape
    times = [product.seconds_each(one.seconds) * 1e6 for one in samples]
    half = harness.quantile(times, 0.5)
    return GemmCase(
        shape.model,
        shape.projection,
        shape.n,
        shape.k,
        product.m,
        threads,
        kernel.label,
        kernel.op,
        kernel.format,
        kernel.rows,
        kernel.isa,
        unit,
        len(samples),
        half,
        harness.quantile(times, 0.2),
        harness.quantile(times, 0.8),
        2.0 * product.m * shape.n * shape.k / half / 1e3,
        harness.fraction("unit", work, samples),
        harness.fraction("dram", work, samples),
        harness.quantile([one.limits.unit_ops for one in samples], 0.5) / 1e9,
        harness.quantile([one.limits.dram_bytes for one in samples], 0.5) / 1e9,
        ratio,
        error,
    )
