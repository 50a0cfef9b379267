"""docs/performance.md from benchmarks/results: `python -m benchmarks.report [--check]`.

Takes the latest run of each benchmark on each machine (--full before quick, and those before runs that left something
out) and benchmarks/notes.md as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks import bench_generate, bench_loading, bench_overhead
from benchmarks.demands import HEADINGS, MISS, PASS, UNKNOWN, rows_of
from benchmarks.harness import RESULTS, ROOT
from kt_sft.formats.staging import write_text

PAGE = ROOT / "docs" / "performance.md"
NOTES = Path(__file__).with_name("notes.md")
OURS = "kt_sft bf16"
COMMANDS = {
    "targets": "python -m benchmarks.targets",
    "moe_layer": "python -m benchmarks.bench_moe_layer",
    "decode": "python -m benchmarks.bench_decode",
    "overhead": "python -m benchmarks.bench_overhead",
    "gemm": "python -m benchmarks.bench_gemm",
    "blocks": "python -m benchmarks.bench_blocks --threads 1",
    "loading": "python -m benchmarks.bench_loading",
    "generate": "python -m benchmarks.bench_generate",
}
RANKS = {"full": 2, "part": 0}  # of modes; all others are between
RECORD = {
    "cpu": "CPU",
    "cores_used": "cores used",
    "numa_nodes": "memory nodes",
    "memory_gib": "memory, GiB",
    "isa": "widest kernels",
    "torch": "torch",
    "torch_cpu_capability": "torch's own kernels",
    "compiler": "compiler",
    "flags": "flags",
}
INTRO = """# Performance

Made by `python -m benchmarks.report` from `benchmarks/results`; do not edit by hand. Every figure is a ratio within one
run: each sample lies between two probes of what the machine can do at that moment (multiply-adds per second, bytes
read from memory per second), all contenders of a case run in the same rounds, and the median over the samples counts.
Answers are checked before anything is timed. Weights are cold: the probe between two samples empties the cache.

`T` is the number of tokens of the whole layer; a quick run takes fewer experts and tokens at the true sizes, so that
every expert has as many rows as in the whole layer. Rates count the products with the frozen weights only, 6 x hidden x
inter per (token, expert) forward and twice that forward + backward. `make targets` and `make bench` run the commands
again, but for bench_blocks, bench_loading and bench_generate, which one calls as their sections show.
"""


def table(headings: list[str], rows: Iterable[Iterable[str]], text_columns: int = 1) -> str:
    """A Markdown table; columns after `text_columns` are aligned right."""
    marks = ["---" if index < text_columns else "---:" for index in range(len(headings))]
    lines = [headings, marks, *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def latest_runs(folder: Path) -> dict[str, tuple[str, Mapping]]:
    """(date, run) by benchmark: the latest full run, else the latest quick one, else the latest of a part."""
    best: dict[str, tuple[tuple, str, Mapping]] = {}
    for path in sorted(folder.glob("*.json")):
        for index, run in enumerate(json.loads(path.read_text())["runs"]):
            rank = (RANKS.get(run["mode"], 1), path.stem, index)
            if run["bench"] not in best or rank > best[run["bench"]][0]:
                best[run["bench"]] = (rank, path.stem, run)
    return {bench: (date, run) for bench, (_, date, run) in best.items()}


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def ratio_cell(one: Mapping) -> str:
    if one["ratio"] is None:
        return "-"
    return ("> " if one.get("is_bound") else "") + f"{one['ratio']:.2f}"


def targets_section(run: Mapping) -> str:
    verdicts = [one["verdict"] for one in run["cases"]]
    counts = ", ".join(f"{verdicts.count(one)} {one.lower()}" for one in (PASS, MISS, UNKNOWN))
    rows = ([*row[:-1], row[-1]] for row in rows_of(run["cases"]))
    text_table = table(HEADINGS, rows, text_columns=2)
    return f"{counts}. Misses are in bold; `x` is the opponent's time over ours.\n\n{text_table}"


def layer_section(run: Mapping) -> str:
    parts = []
    for model in dict.fromkeys(one["model"] for one in run["cases"]):
        cases = [one for one in run["cases"] if one["model"] == model]
        names = [one["name"] for one in cases[0]["contenders"] if one["name"] != OURS]
        rows = []
        for case in cases:
            found = {one["name"]: one for one in case["contenders"]}
            ours = found[OURS]
            rows.append(
                [
                    f"T = {case['tokens_equivalent']}, {case['mode']}",
                    f"{ours['median_ms']:.1f}",
                    f"{ours['gflops']:.0f}",
                    percent(ours["fma_fraction"]),
                    percent(ours["dram_fraction"]),
                    *(ratio_cell(found[name]) if name in found else "" for name in names),
                ]
            )
        first = cases[0]
        title = f"{model}, {first['hidden']} x {first['inter']}, LoRA r = {first['lora_rank']}"
        parts.append(f"**{title}**\n\n{table(['', 'ms', 'GFLOP/s', 'of FMA', 'of DRAM', *names], rows)}")
    return "Columns right of DRAM: time / time of kt_sft bf16 in the same rounds.\n\n" + "\n".join(parts)


def decode_section(run: Mapping) -> str:
    parts = []
    overhead = run.get("call_overhead_us", {})
    for model in dict.fromkeys(one["model"] for one in run["cases"]):
        cases = [one for one in run["cases"] if one["model"] == model]
        names = list(dict.fromkeys(one["name"] for case in cases for one in case["contenders"] if one["median_ms"]))
        headings = ["", *(f"T = {one['tokens']}{what}" for one in cases for what in (", ms", ", of DRAM"))]
        rows = []
        for name in names:
            cells = []
            for case in cases:
                one = next(one for one in case["contenders"] if one["name"] == name)
                cells += [f"{one['median_ms']:.2f}" if one["median_ms"] else "", percent(one["dram_fraction"])]
            rows.append([name, *cells])
        call = f"; a call without work takes {overhead[model]:.0f} us" if model in overhead else ""
        parts.append(f"**{model}**, LoRA r = {cases[0]['lora_rank']}{call}\n\n{table(headings, rows)}")
    return "\n".join(parts)


def overhead_section(run: Mapping) -> str:
    intro = (
        "Microseconds of one token's call of the expert layer with an adapter, part by part, on layers with as many "
        "experts and slots but narrow sides; the products with experts of true size beside them.\n\n"
    )
    return intro + table(bench_overhead.HEADINGS, bench_overhead.rows_of(run["cases"]))


def gemm_section(run: Mapping) -> str:
    parts = []
    groups = dict.fromkeys((one["model"], one["projection"], one["threads"]) for one in run["cases"])
    threads = max(group[2] for group in groups)
    for model, projection, count in groups:
        if count != threads:
            continue
        cases = [one for one in run["cases"] if (one["model"], one["projection"], one["threads"]) == (
            model, projection, count)]  # fmt: skip
        counts = list(dict.fromkeys(one["m"] for one in cases))
        rows = []
        for kernel in dict.fromkeys(one["kernel"] for one in cases):
            mine = {one["m"]: one for one in cases if one["kernel"] == kernel}
            unit = next(iter(mine.values()))["unit"]
            rows.append([f"`{kernel}`", unit, *(product_cell(mine[m]) if m in mine else "" for m in counts)])
        title = f"{model} {projection} [{cases[0]['n']}, {cases[0]['k']}], {count} threads"
        parts.append(f"**{title}**\n\n{table(['kernel', 'unit', *(f'm = {m}' for m in counts)], rows, 2)}")
    return (
        "Part of the peak of the compute unit; `D`: of DRAM bandwidth, where that is more. m: rows per expert.\n\n"
        + "\n".join(parts)
    )


def product_cell(case: Mapping) -> str:
    """Part of the compute unit's peak, or `D` and that of DRAM where it is more."""
    if case["dram_fraction"] > case["unit_fraction"]:
        return f"D {case['dram_fraction']:.0%}"
    return f"{case['unit_fraction']:.0%}"


def blocks_section(run: Mapping) -> str:
    rows = []
    for one in run["cases"]:
        ratio = "-" if one["ggml_ratio"] is None else f"{one['ggml_ratio']:.2f}"
        other = "-" if one["ggml_error"] is None else f"{one['ggml_error']:.1e}"
        fractions = percent(one["dram_fraction"]), percent(one["fma_fraction"])
        rows.append([one["type"], one["m"], *fractions, f"{one['error']:.1e}", ratio, other])
    first = run["cases"][0]
    headings = ["type", "rows", "of DRAM", "of FMA", "error", "ggml's time / ours", "ggml's error"]
    threads = f"{first['threads']} thread" + ("s" if first["threads"] > 1 else "")
    intro = f"One matrix of {first['n']} x {first['k']}, {threads}; errors against float64 on the stored weights.\n\n"
    return intro + table(headings, rows)


def loading_section(run: Mapping) -> str:
    intro = (
        "Seconds and bytes of one run, with a warm page cache. Packing the linear layers outside the experts "
        "(`cpu_linear`) takes as much new memory as they have bytes; `fresh memory` is how long this machine takes to "
        "hand that out, filled with one value.\n\n"
    )
    cases = run["cases"]
    text_table = table(bench_loading.HEADINGS, bench_loading.rows_of(cases))
    return f"{bench_loading.title_of(cases)}.\n\n{intro}{text_table}"


def generate_section(run: Mapping) -> str:
    intro = "Greedy, through `generate`; all contenders in the same rounds, times per token after the first.\n\n"
    parts = (
        f"**{bench_generate.title_of(one)}**\n\n{table(bench_generate.HEADINGS, bench_generate.rows_of(one))}"
        for one in run["cases"]
    )
    return intro + "\n".join(parts)


SECTIONS = {
    "targets": ("Targets", targets_section),
    "moe_layer": ("MoE layer", layer_section),
    "decode": ("Decoding", decode_section),
    "overhead": ("A call beside its products", overhead_section),
    "gemm": ("Single products", gemm_section),
    "blocks": ("Block types of GGUF files", blocks_section),
    "loading": ("Converting and loading", loading_section),
    "generate": ("Generation with whole models", generate_section),
}


def machine_section(folder: Path, page_folder: Path) -> str:
    """Everything that is known of one machine."""
    runs = latest_runs(folder)
    machine = next(runs[bench][1] for bench in SECTIONS if bench in runs)["machine"]
    rows = [[label, machine[key]] for key, label in RECORD.items() if machine.get(key)]
    parts = [f"## {machine['cpu']}, {machine['cores_used']} cores\n", table(["", ""], rows, 2)]
    pictures = sorted(folder.glob("*-roofline.png"))
    if pictures:
        link = Path(*[".."] * len(page_folder.relative_to(ROOT).parts)) / pictures[-1].relative_to(ROOT)
        parts.append(f"![rate against rows per expert, with the ceilings of the machine]({link.as_posix()})\n")
    for bench, (title, render_section) in SECTIONS.items():
        if bench not in runs:
            continue
        date, run = runs[bench]
        commit = str(run["machine"]["commit"])[:7] + (
            " with changes" if run["machine"].get("uncommitted_changes") else ""
        )
        source = f"`{COMMANDS[bench]}`, {run['mode']} run of {date} {run['time_utc']} UTC, commit {commit}"
        parts.append(f"### {title}\n\n{source}.\n\n{render_section(run)}")
    return "\n".join(parts)


def render(results: Path = RESULTS, notes: Path = NOTES, page_folder: Path = PAGE.parent) -> str:
    folders = sorted(one for one in results.iterdir() if one.is_dir() and any(one.glob("*.json")))
    sections = [INTRO, *(machine_section(one, page_folder) for one in folders), notes.read_text()]
    return "\n".join(sections)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is not up to date")
    options = parser.parse_args(arguments)
    page = render()
    if options.check:
        return int(not PAGE.exists() or PAGE.read_text() != page)
    write_text(PAGE, page)
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
