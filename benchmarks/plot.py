"""The roofline picture: rate against rows per expert for each kernel row, under the ceilings of the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness import quantile
from benchmarks.products import GemmCase
from kt_sft.formats.staging import new_file

# One colour per weight format (bf16 rows) and one for the int8 rows of each; from Okabe and Ito's colour-blind set.
COLOURS = {
    ("bf16", "bf16"): "#0072B2",
    ("int8", "bf16"): "#009E73",
    ("int4", "bf16"): "#D55E00",
    ("int8", "bfp16"): "#56B4E9",
    ("int4", "bfp16"): "#E69F00",
    ("int8", "int8"): "#CC79A7",
    ("int4", "int8"): "#8C6D00",
}
MARKERS = "osD^v<>PX"
DIRECTIONS = {"forward": "forward", "input_grad": "input gradient"}


def draw(cases: Sequence[GemmCase], machine: Mapping[str, object], results: Path | None) -> Path:
    """Draw the first matrix of the cases with all threads, beside `results` or, without, in the working directory.

    Rows of AVX2 are left out where the CPU has wider ones: nobody could tell thirty curves apart.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    first = cases[0]
    threads = max(one.threads for one in cases)
    mine = [one for one in cases if (one.n, one.k, one.threads) == (first.n, first.k, threads)]
    mine = [one for one in mine if one.isa not in ("scalar", "avx2")] or [one for one in mine if one.isa != "scalar"]
    figure, axes = plt.subplots(1, len(DIRECTIONS), figsize=(13, 6.2), sharey=True, sharex=True)
    for axis, (op, title) in zip(axes, DIRECTIONS.items(), strict=True):
        some = [one for one in mine if one.op == op]
        _ceilings(axis, mine, some)
        _kernels(axis, some)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("rows per expert")
        axis.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(0.0, -0.11), ncol=2)
    counts = sorted({one.m for one in mine})
    axes[0].set_xticks(counts, [str(one) for one in counts])
    axes[0].set_ylabel("GFLOP/s (int8 rows: GOP/s)")
    rates = [one.gflops for one in mine]
    peaks = [one.probe_unit_gops for one in mine]
    axes[0].set_ylim(min(rates) / 1.5, max(*rates, *peaks) * 1.6)
    axes[0].yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes[0].yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes[0].minorticks_off()
    axes[0].set_xlim(min(counts) / 1.2, max(counts) * 1.2)
    dram = quantile([one.probe_dram_gbs for one in mine], 0.5)
    figure.suptitle(
        f"{machine['cpu']}, {threads} threads: {first.model} {first.projection} [{first.n}, {first.k}], cold weights\n"
        f"solid: peak of a compute unit; dotted: DRAM, {dram:.0f} GB/s, by weight format",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    figure.tight_layout()
    path = results.with_name(f"{results.stem}-roofline.png") if results else Path("roofline.png").resolve()
    with new_file(path) as stream:
        figure.savefig(stream, dpi=100, format=path.suffix[1:])
    plt.close(figure)
    return path


def _kernels(axis: object, cases: Sequence[GemmCase]) -> None:
    for index, name in enumerate(dict.fromkeys(one.kernel for one in cases)):
        some = sorted((one for one in cases if one.kernel == name), key=lambda one: one.m)
        axis.loglog(
            [one.m for one in some],
            [one.gflops for one in some],
            color=COLOURS[some[0].format, some[0].rows],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4.5,
            linewidth=1.6 if "gemv" not in name else 1.0,
            linestyle="-" if "gemv" not in name else "--",
            label=name,
        )


def _ceilings(axis: object, every: Sequence[GemmCase], cases: Sequence[GemmCase]) -> None:
    """A line per compute unit, and the slope of DRAM per weight format, from the medians of the probes."""
    counts = sorted({one.m for one in every})
    peaks = {
        unit: quantile([one.probe_unit_gops for one in every if one.unit == unit], 0.5)
        for unit in dict.fromkeys(one.unit for one in cases)
    }
    for unit, peak in peaks.items():
        axis.axhline(peak, color="#555555", linewidth=1.0, zorder=1)
        axis.text(counts[-1], peak * 1.03, f"{unit}: {peak:.0f}", fontsize=8, color="#333333", va="bottom", ha="right")
    top = max(peaks.values(), default=1.0) * 1.2
    dram = quantile([one.probe_dram_gbs for one in every], 0.5)
    for weight_format in dict.fromkeys(one.format for one in cases):
        # A byte carries the same work for all kernels of a format: rate / bytes per second, per row.
        work = [c.gflops / c.m / (c.dram_fraction * c.probe_dram_gbs) for c in cases if c.format == weight_format]
        slope = quantile(work, 0.5) * dram
        ends = [counts[0], top / slope]
        axis.loglog(ends, [slope * end for end in ends], color="#999999", linewidth=1.0, linestyle=":", zorder=1)
        axis.text(ends[1], top * 1.03, weight_format, fontsize=8, color="#666666", va="bottom", ha="center")
