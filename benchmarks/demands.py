"""The speed and memory targets of this project, and the verdict on measured figures. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from rich.table import Table

from benchmarks.contest import BASE_ONLY, MODELS, OURS, REFERENCE, rank_name
from benchmarks.gguf_mix import DOWN, INSTEAD

V2, QWEN, V3 = MODELS
GROUPED = "grouped_mm bf16"
KT = {one: f"kt-kernel {one}" for one in ("bf16", "int8", "int4")}
INFERENCE = {one: f"kt_sft {one} in inference" for one in ("int8", "int4")}  # with the rows that inference takes here
W8A8 = "kt_sft int8, int8 rows"
FORWARD, STEP = "forward", "forward + backward"
PASS, MISS, UNKNOWN, NONE = "pass", "MISS", "not measurable", ""


def share(mode: str, tokens: int, name: str, limit: str) -> str:
    """Key of a figure: the part of a limit (dram, fma, unit) that `name` reaches."""
    return f"{mode}, T = {tokens}: {name}, part of {limit}"


def times(mode: str, tokens: int, name: str, ours: str) -> str:
    """Key of a figure: time of `name` / time of `ours`."""
    return f"{mode}, T = {tokens}: {name} / {ours}"


def gradient_key(weight_format: str, band: tuple[int, ...]) -> str:
    """Key of a figure: the least rate of an input gradient / rate of its forward over a band of rows per expert."""
    return f"dX / forward, {weight_format}, {band[0]} to {band[-1]} rows"


AVX2_FMA, AVX2_KT = "avx2 kernels, 512 rows: part of fma", "avx2 kernels, T = 512: kt-kernel avx2 bf16 / ours"
MEMORY = {one: f"packed bytes of {one} / own bytes" for one in ("bf16", "int8", "int4")}
LOAD_PEAK = {one: f"load peak of {one} / (packed + one expert)" for one in MEMORY}
BANDS = {(64, 128, 512): 0.85, (8, 16, 32): 0.70, (1, 2, 4): 0.90}


@dataclass(frozen=True)
class Demand:
    """One demand of one line: the figure `key` has to be at least (at most) the limit of each model that has one."""

    line: str
    text: str
    key: str
    limits: Mapping[str, float]
    at_most: bool = False
    is_part: bool = False  # shown in %, else as a factor


@dataclass(frozen=True)
class Figure:
    """A measured value, or None with the reason; a bound is a value that is at least this large."""

    value: float | None
    note: str = ""
    is_bound: bool = False


@dataclass(frozen=True)
class Judged:
    demand: Demand
    figures: Mapping[str, Figure] = field(default_factory=dict)

    def verdict_of(self, model: str) -> str:
        limit, figure = self.demand.limits.get(model), self.figures.get(model)
        if limit is None or figure is None:
            return NONE
        if figure.value is None or (figure.is_bound and figure.value < limit):
            return UNKNOWN
        return PASS if (figure.value <= limit if self.demand.at_most else figure.value >= limit) else MISS

    @property
    def verdict(self) -> str:
        """MISS if a model misses, pass if at least one passes, else not measurable."""
        verdicts = {self.verdict_of(model) for model in self.figures}
        return next((one for one in (MISS, PASS, UNKNOWN) if one in verdicts), NONE)

    @property
    def notes(self) -> list[str]:
        return list(dict.fromkeys(one.note for one in self.figures.values() if one.note))

    def record(self) -> dict[str, object]:
        """For JSON."""
        demand = self.demand
        models = {
            name: {"limit": demand.limits.get(name), "verdict": self.verdict_of(name), **asdict(figure)}
            for name, figure in self.figures.items()
        }
        return {
            "line": demand.line,
            "demand": demand.text,
            "at_most": demand.at_most,
            "is_part": demand.is_part,
            "verdict": self.verdict,
            "models": models,
        }


def every(limit: float, **others: float) -> dict[str, float]:
    """The same limit for all models but those named (v2, qwen, v3); -1: no demand."""
    names = {"v2": V2, "qwen": QWEN, "v3": V3}
    limits = {one: limit for one in MODELS} | {names[key]: value for key, value in others.items()}
    return {model: value for model, value in limits.items() if value >= 0}


def _part(line: str, text: str, key: str, limits: Mapping[str, float], at_most: bool = False) -> Demand:
    return Demand(line, text, key, limits, at_most=at_most, is_part=True)


def _forward_lines() -> list[Demand]:
    t1, t16, t512, t2048 = (f"forward T = {one}, bf16" for one in (1, 16, 512, 2048))
    t1_int8, t1_int4 = "forward T = 1, int8", "forward T = 1, int4"
    int8 = "forward T = 512, int8 with quantisation"
    return [
        _part(t1, ">= 80 % of DRAM", share(FORWARD, 1, OURS, "dram"), every(0.80)),
        Demand(t1, ">= 2 x torch fp32", times(FORWARD, 1, REFERENCE, OURS), every(2.0)),
        Demand(t1, ">= 1.5 x kt-kernel bf16", times(FORWARD, 1, KT["bf16"], BASE_ONLY), every(1.5)),
        _part(t1_int8, ">= 75 % of DRAM", share(FORWARD, 1, INFERENCE["int8"], "dram"), every(0.75)),
        Demand(t1_int8, ">= 2 x kt-kernel int8", times(FORWARD, 1, KT["int8"], INFERENCE["int8"]), every(2.0)),
        _part(t1_int4, ">= 60 % of DRAM", share(FORWARD, 1, INFERENCE["int4"], "dram"), every(0.60)),
        Demand(t1_int4, ">= 1.5 x kt-kernel int4", times(FORWARD, 1, KT["int4"], INFERENCE["int4"]), every(1.5)),
        _part(t16, ">= 70 % of DRAM", share(FORWARD, 16, OURS, "dram"), every(0.70, v3=-1)),
        _part(t16, ">= 45 % of FMA (V3)", share(FORWARD, 16, OURS, "fma"), {V3: 0.45}),
        Demand(t16, ">= 2 x torch fp32", times(FORWARD, 16, REFERENCE, OURS), every(2.0)),
        Demand(t16, ">= 1.7 x kt-kernel bf16", times(FORWARD, 16, KT["bf16"], BASE_ONLY), every(1.7)),
        _part(t512, ">= 60 % of FMA (V3 72 %)", share(FORWARD, 512, OURS, "fma"), every(0.60, v3=0.72)),
        Demand(t512, ">= 2.5 x torch fp32 (V3 1.3)", times(FORWARD, 512, REFERENCE, OURS), every(2.5, v3=1.3)),
        Demand(t512, ">= 2 x kt-kernel bf16", times(FORWARD, 512, KT["bf16"], BASE_ONLY), every(2.0)),
        _part(t2048, ">= 75 % of FMA", share(FORWARD, 2048, OURS, "fma"), every(0.75, v3=-1)),
        Demand(t2048, ">= 2 x torch fp32", times(FORWARD, 2048, REFERENCE, OURS), every(2.0, v3=-1)),
        Demand(t2048, ">= 2.5 x kt-kernel bf16", times(FORWARD, 2048, KT["bf16"], BASE_ONLY), every(2.5, v3=-1)),
        _part(int8, ">= 40 % of the int8 peak (V3 65 %)", share(FORWARD, 512, W8A8, "unit"), every(0.40, v3=0.65)),
        Demand(int8, ">= 5 x kt-kernel int8", times(FORWARD, 512, KT["int8"], W8A8), every(5.0)),
    ]


def _step_lines() -> list[Demand]:
    t512, t16 = f"{STEP} T = 512, bf16, r = 8", f"{STEP} T = 16"
    base = f"{STEP}, quantised base, T = 2048 (V3: 512)"
    lora = "LoRA overhead, T = 512"
    demands = [
        _part(t512, ">= 50 % of FMA", share(STEP, 512, OURS, "fma"), every(0.50)),
        Demand(t512, ">= 3 x torch fp32 (V3 1.2)", times(STEP, 512, REFERENCE, OURS), every(3.0, v3=1.2)),
        Demand(t512, ">= 4 x grouped_mm (V3 3.5)", times(STEP, 512, GROUPED, OURS), every(4.0, v3=3.5)),
        _part(t16, ">= 55 % of DRAM", share(STEP, 16, OURS, "dram"), every(0.55)),
        Demand(t16, ">= 4 x torch fp32 (Qwen3 9)", times(STEP, 16, REFERENCE, OURS), every(4.0, qwen=9.0)),
        Demand(t16, ">= 2 x grouped_mm", times(STEP, 16, GROUPED, OURS), every(2.0)),
        _part(base, "int8 >= 80 % of bf16's speed", times(STEP, 2048, OURS, "kt_sft int8"), every(0.80)),
        _part(base, "int4 >= 80 % of bf16's speed", times(STEP, 2048, OURS, "kt_sft int4"), every(0.80)),
    ]
    for name, kind in DOWN.items():
        text = f"Q4_K_M, {kind} down (V2 {INSTEAD[kind]}) >= 80 % of bf16's speed"
        demands.append(_part(base, text, times(STEP, 2048, OURS, name), every(0.80)))
    for mode, rank, limit in ((FORWARD, 8, 0.08), (STEP, 8, 0.12), (FORWARD, 64, 0.25), (STEP, 64, 0.25)):
        name = OURS if rank == 8 else rank_name(rank)
        key = times(mode, 512, name, BASE_ONLY)
        demands.append(Demand(lora, f"r = {rank}, {mode}: <= {1 + limit:.2f} x", key, every(1 + limit), at_most=True))
    return demands


def _other_lines() -> list[Demand]:
    memory, gradient = "memory", "input gradient against forward"
    demands = [
        Demand(memory, f"{one}: packed <= 1.03 x own bytes", MEMORY[one], every(1.03), at_most=True) for one in MEMORY
    ]
    demands += [  # 1 %: pages and the allocator
        Demand(memory, f"{one}: load peak <= packed + one expert", LOAD_PEAK[one], {V2: 1.01}, at_most=True)
        for one in MEMORY
    ]
    avx2 = "AVX2 kernels, same CPU"
    demands += [
        _part(avx2, ">= 70 % of the AVX2 FMA peak at 512 rows", AVX2_FMA, every(0.70)),
        Demand(avx2, ">= 5 x kt-kernel's AVX2 bf16", AVX2_KT, every(5.0)),
    ]
    for weight_format in MEMORY:
        for band, limit in BANDS.items():
            text = f"{weight_format}, {band[0]} - {band[-1]} rows: >= {limit:.0%}"
            demands.append(_part(gradient, text, gradient_key(weight_format, band), every(limit)))
    return demands


DEMANDS = [*_forward_lines(), *_step_lines(), *_other_lines()]


def judge(figures: Mapping[str, Mapping[str, Figure]], demands: Iterable[Demand] = DEMANDS) -> list[Judged]:
    """Verdicts on figures[model][key]; a figure that nobody took is not measurable."""
    missing = Figure(None, "nothing was measured")
    return [
        Judged(demand, {model: figures[model].get(demand.key, missing) for model in figures if model in demand.limits})
        for demand in demands
    ]


def exit_code(judged: Iterable[Judged]) -> int:
    return int(any(one.verdict == MISS for one in judged))


def figure_text(figure: Mapping[str, object], is_part: bool) -> str:
    value = figure["value"]
    if value is None:
        return "-"
    return ("> " if figure["is_bound"] else "") + (f"{value:.0%}" if is_part else f"{value:.2f} x")


def rows_of(records: Iterable[Mapping]) -> list[list[str]]:
    """Text of the table: line, demand, one figure per model (a miss in bold of Markdown), verdict with notes."""
    rows, last = [], ""
    for one in records:
        cells = []
        for model in MODELS:
            figure = one["models"].get(model)
            text = figure_text(figure, one["is_part"]) if figure else ""
            cells.append(f"**{text}**" if figure and figure["verdict"] == MISS else text)
        notes = list(dict.fromkeys(figure["note"] for figure in one["models"].values() if figure["note"]))
        verdict = one["verdict"] + (f" ({'; '.join(notes)})" if notes else "")
        rows.append([one["line"] if one["line"] != last else "", one["demand"], *cells, verdict])
        last = one["line"]
    return rows


HEADINGS = ["line", "demand", *(one.whole.model for one in MODELS.values()), "verdict"]


def table_of(judged: Iterable[Judged]) -> Table:
    """For the terminal."""
    table = Table(title="Targets, ratios within this run", title_justify="left")
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if 2 <= index < 2 + len(MODELS) else "left")
    for row in rows_of(one.record() for one in judged):
        table.add_row(*(cell.replace("**", "") for cell in row))
    return table


def summary(judged: Iterable[Judged]) -> str:
    verdicts = [one.verdict for one in judged]
    return ", ".join(f"{verdicts.count(one)} {one.lower()}" for one in (PASS, MISS, UNKNOWN))
