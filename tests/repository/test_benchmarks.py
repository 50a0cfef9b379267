"""The benchmark harness: its statistics, its schedule and its file, on made-up times; no speed is asserted here."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    bench_overhead,
    contest,
    demands,
    gguf_mix,
    harness,
    kt_kernel_opponent,
    problem,
    products,
    report,
    roofline,
    targets,
)
from benchmarks.harness import CaseResult, Contender, Sample, Work
from benchmarks.roofline import Limits

SHAPE = problem.LayerShape("tiny", hidden=48, inter=32, num_experts=4, top_k=2)


class FakeClock:
    """Time that passes only when a contender says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


def test_quantile_interpolates_between_order_statistics():
    assert harness.quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert harness.quantile([10.0, 20.0], 0.2) == pytest.approx(12.0)
    assert harness.quantile([7.0], 0.8) == 7.0
    with pytest.raises(ValueError, match="at least one value"):
        harness.quantile([], 0.5)


def test_a_cheap_contender_leaves_its_budget_to_the_others():
    assert harness.plan_samples([0.01, 1.0], 10.0, most=20, least=2) == [20, 9]
    assert harness.plan_samples([5.0, 0.1], 1.0, most=20, least=2) == [2, 5]


@pytest.mark.parametrize(("count", "rounds"), [(1, 20), (3, 20), (7, 20), (20, 20)])
def test_samples_spread_over_all_rounds(count, rounds):
    taken = [index for index in range(rounds) if harness.takes_part(index, count, rounds)]
    assert len(taken) == count
    assert max(b - a for a, b in zip(taken, [*taken[1:], rounds + taken[0]])) <= math.ceil(rounds / count)


def test_interleaved_rounds_time_each_contender_between_two_probes():
    clock, probes, order = FakeClock(), iter(range(1, 100)), []

    def contender(name, seconds):
        def run(batch):
            order.append((name, batch))
            clock.spend(seconds)

        return Contender(name, run, seconds)

    samples = harness.run_interleaved(
        [contender("fast", 1.0), contender("slow", 3.0)],
        lambda: Limits(float(next(probes)), 2.0),
        [2, 1],
        clock=clock,
    )
    assert order == [("fast", 0), ("slow", 0), ("fast", 0), ("fast", 1), ("slow", 1)]
    assert [one.seconds for one in samples["fast"]] == [1.0, 1.0]
    assert [(one.round, one.seconds) for one in samples["slow"]] == [(1, 3.0)]
    assert [one.limits.fma_flops for one in samples["fast"]] == [1.5, 2.5]


def test_work_of_another_process_is_timed_by_that_process():
    clock = FakeClock()
    remote = Contender("remote", lambda batch: clock.spend(5.0) or 0.25, 0.25, reports_seconds=True)
    samples = harness.run_interleaved([remote], lambda: Limits(1.0, 1.0), [1], clock=clock)
    assert [one.seconds for one in samples["remote"]] == [0.25]


def test_summary_gives_fractions_of_the_limits_beside_each_sample():
    limits = Limits(fma_flops=100e9, dram_bytes=10e9)
    ours = [Sample(index, 1.0, limits) for index in range(4)]
    theirs = [Sample(index, 2.0 + index, limits) for index in (1, 3)]
    summary = harness.summarise("them", theirs, Work(flops=200e9, bytes=5e9), ours)
    assert (summary.samples, summary.median_ms, summary.gflops) == (2, 4000.0, 50.0)
    assert summary.ratio == pytest.approx(4.0)
    assert summary.fma_fraction == pytest.approx((200 / 3 / 100 + 200 / 5 / 100) / 2)
    assert summary.dram_fraction == pytest.approx((5 / 3 / 10 + 5 / 5 / 10) / 2)
    assert harness.summarise("none", [], Work(1.0, 1.0), ours).median_ms is None


def test_machine_slug_has_cpu_and_cores_only():
    assert harness.machine_slug("Intel(R) Xeon(R) Processor @ 2.80GHz", 2) == "intel-xeon-2-80ghz-2c"
    assert harness.machine_slug("AMD EPYC 7B13", 16) == "amd-epyc-7b13-16c"


def test_results_file_keeps_every_run_of_a_day(tmp_path):
    limits = Limits(1e11, 1e10)
    ours = harness.summarise("kt_sft bf16", [Sample(0, 0.5, limits)], Work(1e9, 1e6), [])
    case = CaseResult("tiny", "forward", 48, 32, 4, 2, 3, 3, 8, 1.0, 100.0, 10.0, contenders=[ours])
    machine = harness.machine_record(2, "avx2")
    for _ in range(2):
        path = harness.save_results(machine, {}, [case], bench="moe_layer", mode="quick", folder=tmp_path)
    content = json.loads(path.read_text())
    assert path.parent.parent == tmp_path and path.parent.name.endswith("-2c")
    assert (content["schema"], len(content["runs"])) == (harness.SCHEMA, 2)
    run = content["runs"][0]
    assert {"bench", "mode", "time_utc", "machine", "limits", "cases"} == set(run)
    assert {"cpu", "cores_used", "numa_nodes", "compiler", "flags", "commit", "torch", "isa"} <= set(run["machine"])
    assert run["cases"][0]["contenders"][0]["median_ms"] == 500.0
    import socket

    assert socket.gethostname() not in path.read_text()


@pytest.mark.parametrize("name", ["torch loop fp32", "grouped_mm fp32", "torch loop bf16", "grouped_mm bf16"])
def test_every_opponent_agrees_with_the_float64_reference(name):
    layer = problem.make_layer(SHAPE, rank=8)
    (batch,) = problem.make_batches(SHAPE, tokens=5, count=1)
    reference = problem.answers(problem.exact_layer(layer), batch)
    got = problem.answers(problem.torch_contenders(layer)[name], batch)
    assert problem.worst_error(got, reference) < (1e-5 if "fp32" in name else 3e-2)
    broken = [got[0] * 1.1, *got[1:]]
    assert problem.worst_error(broken, reference) > 5e-2


def test_worst_error_treats_nan_as_wrong():
    assert problem.worst_error([torch.tensor([math.nan])], [torch.tensor([1.0])]) == math.inf


def test_a_slice_keeps_the_rows_per_expert_of_the_whole_layer():
    for model in contest.MODELS.values():
        rows = 512 * model.whole.top_k / model.whole.num_experts
        assert model.slice_tokens(512) * model.slice.top_k / model.slice.num_experts == pytest.approx(rows, rel=0.05)
        assert (model.slice.hidden, model.slice.inter) == (model.whole.hidden, model.whole.inter)


# --- opponents and contestants -----------------------------------------------------------------------------------


def test_int8_opponent_agrees_with_the_float64_reference():
    layer = problem.make_layer(SHAPE, rank=8)
    (batch,) = problem.make_batches(SHAPE, tokens=5, count=1)
    expected = problem.infer(problem.exact_layer(layer), batch)
    got = problem.infer(problem.torch_contenders(layer, ["torch _int_mm"])["torch _int_mm"], batch)
    assert 1e-4 < problem.worst_error([got], [expected]) < 5e-2


@pytest.mark.parametrize("name", ["torch loop fp32", "grouped_mm fp32"])
def test_a_layer_without_lora_has_no_lora_gradients(name):
    layer = problem.with_rank(problem.make_layer(SHAPE, rank=8), 0)
    (batch,) = problem.make_batches(SHAPE, tokens=5, count=1)
    got = problem.answers(problem.torch_contenders(layer, [name])[name], batch)
    assert layer.rank == 0 and len(got) == 3
    assert problem.worst_error(got, problem.answers(problem.exact_layer(layer), batch)) < 1e-5


def fake_bench():
    return SimpleNamespace(missing={}, contestants={}, layer=problem.make_layer(SHAPE, rank=8))


def fake_session():
    return SimpleNamespace(machine={"numa_nodes": 1}, threads=1)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("/nowhere/python", "/nowhere/python: No such file or directory"),
        (sys.executable, "ModuleNotFoundError: No module named 'kt_kernel'"),
        ("", "not installed"),
    ],
)
def test_a_missing_opponent_is_named_with_its_reason(where, reason, monkeypatch):
    if importlib.util.find_spec("kt_kernel") is not None:
        pytest.skip("kt-kernel is installed")
    bench = fake_bench()
    with kt_kernel_opponent.joined(bench, SimpleNamespace(kt_kernel_python=where), fake_session(), 4):
        assert not bench.contestants
    assert set(bench.missing) == {"kt-kernel bf16", "kt-kernel int8", "kt-kernel int4"}
    assert all(reason in one for one in bench.missing.values())


@pytest.mark.parametrize(("inter", "down"), [(256, ("q4_k", "q6_k")), (96, ("q5_0", "q8_0"))])
def test_layers_of_k_quants_are_checked_against_their_own_weights(inter, down):
    layer = problem.make_layer(problem.LayerShape("blocks", 256, inter, num_experts=3, top_k=2), rank=8)
    (batch,) = problem.make_batches(layer.shape, tokens=5, count=1)
    bench = contest.LayerBench(layer, roofline=None, max_pass_seconds=1.0)
    names = list(gguf_mix.DOWN)
    bench.add_ours([contest.OURS])
    bench.add_blocks(names)
    assert next(dict(gguf_mix.block_layers(layer, names))[names[0]].experts())[0].shape == (inter, 144)
    assert [bench.contestants[one].computes.experts.formats for one in names] == [("q4_k", "q4_k", one) for one in down]
    for name in names:
        one = bench.contestants[name]
        assert 1e-4 < bench.check(name, batch, backward=True) < one.max_error
        assert one.layer.lora is layer.lora and 0.56 < one.weight_bytes < 1.3
        exact = problem.answers(problem.exact_layer(one.layer), batch)
        others = problem.answers(problem.exact_layer(layer), batch)
        assert problem.worst_error(others, exact) > 0.5


def test_the_fast_reference_has_the_weights_of_the_contestant(monkeypatch):
    monkeypatch.setattr(contest, "EXACT_REFERENCE_FLOPS", 0.0)
    layer = problem.make_layer(problem.LayerShape("blocks", 256, 96, num_experts=3, top_k=2), rank=8)
    (batch,) = problem.make_batches(layer.shape, tokens=5, count=1)
    bench = contest.LayerBench(layer, roofline=None, max_pass_seconds=1.0)
    bench.add_torch([contest.REFERENCE])
    bench.add_blocks(gguf_mix.DOWN)
    for name in (contest.REFERENCE, *gguf_mix.DOWN):
        assert bench.check(name, batch, backward=False) < contest.MAX_ERROR["bf16"]


def test_a_slow_opponent_is_bounded_by_fewer_tokens():
    layer = problem.make_layer(SHAPE, rank=8)
    bench = object.__new__(contest.LayerBench)
    name = "torch loop fp32"
    bench.contestants = {name: contest.Contestant(problem.torch_contenders(layer, [name])[name], layer, 1e-4)}
    bench._max_pass_seconds = 1.0
    (batch,) = problem.make_batches(SHAPE, tokens=64, count=1)
    trial = contest.Trial(SHAPE, "forward", 64, 64, "fma_avx2")
    bench._bound(trial, name, batch, False, expected=16.0)
    assert "4 of 64 tokens" in trial.notes[name]
    trial.samples["ours"] = [Sample(0, trial.at_least[name] / 3, Limits(1e11, 1e10))]
    assert trial.ratio(name, "ours") == pytest.approx(3.0)
    bench._bound(trial, name, batch.head(4), False, expected=16.0)
    assert "not timed" in trial.notes[name]


def test_every_kernel_row_has_a_compute_unit():
    units = {(rows, isa): roofline.unit_of(rows, isa) for rows in ("bf16", "int8") for isa in roofline.ISAS}
    assert units["bf16", "avx512_vnni"] == "fma_avx512" and units["int8", "avx512_bf16"] == "int8_vnni"
    assert units["bf16", "amx_int8"] == "bf16_amx" and units["int8", "amx_bf16"] == "int8_vnni"
    assert set(units.values()) == set(roofline.UNITS)


# --- targets -----------------------------------------------------------------------------------------------------


def figures_that_pass():
    return {
        model: {one.key: demands.Figure(one.limits[model]) for one in demands.DEMANDS if model in one.limits}
        for model in contest.MODELS
    }


def test_every_line_of_the_targets_is_there_and_every_figure_is_taken():
    lines = {one.line for one in demands.DEMANDS}
    assert len(lines) == 14 and len(demands.DEMANDS) == len({one.key for one in demands.DEMANDS}) == 50
    taken = set()
    for tokens, backward, names in targets.TRIALS:
        trial = contest.Trial(SHAPE, "", tokens, tokens, "", work={one: None for one in names})
        mode = demands.STEP if backward else demands.FORWARD
        taken |= set(targets.trial_figures(trial, mode, tokens, {}, {}))
    others = [demands.AVX2_FMA, demands.AVX2_KT]
    others += [*demands.MEMORY.values(), *demands.LOAD_PEAK.values()]
    others += [demands.gradient_key(one, band) for one in demands.MEMORY for band in demands.BANDS]
    assert {one.key for one in demands.DEMANDS} <= taken | set(others)


def test_targets_exit_code_counts_misses_only():
    figures = figures_that_pass()
    judged = demands.judge(figures)
    assert demands.exit_code(judged) == 0 and {one.verdict for one in judged} == {"pass"}
    first, *_, last = demands.DEMANDS
    figures[demands.V2][first.key] = demands.Figure(None, "its opponent is not installed")
    assert demands.exit_code(demands.judge(figures)) == 0
    figures[demands.QWEN][last.key] = demands.Figure(last.limits[demands.QWEN] - 0.01)
    judged = demands.judge(figures)
    assert demands.exit_code(judged) == 1 and judged[-1].verdict == "MISS"
    assert demands.summary(judged) == "49 pass, 1 miss, 0 not measurable"


def test_a_lower_bound_can_pass_but_not_miss():
    demand = demands.Demand("line", "text", "key", {"m": 2.0})

    def verdict(*figure):
        return demands.judge({"m": {"key": demands.Figure(*figure)}}, [demand])[0].verdict

    assert verdict(3.0, "", True) == "pass"
    assert verdict(1.0, "", True) == "not measurable"
    assert verdict(1.0, "", False) == "MISS"
    assert demands.judge({"m": {}}, [demand])[0].verdict == "not measurable"


# --- page and picture --------------------------------------------------------------------------------------------


def gemm_cases():
    cases = []
    for m in (1, 64):
        for op, kernel in (("forward", "gemm_x_avx2"), ("input_grad", "dgrad_x_avx2")):
            cases.append(
                products.GemmCase(
                    "tiny", "gate", 32, 48, m, 2, kernel, op, "bf16", "bf16", "avx2", "fma_avx2", 3,
                    10.0, 9.0, 11.0, 2.0 * m, 0.02 * m / 2, 0.5 / m, 200.0, 30.0, None, 1e-3,
                )
            )  # fmt: skip
    return cases


def record_of_everything(folder):
    limits = Limits(1e11, 1e10)
    ours = harness.summarise("kt_sft bf16", [Sample(0, 0.5, limits)], Work(1e9, 1e6), [])
    slow = harness.Summary("torch loop fp32", 0, None, None, None, ratio=9.5, is_bound=True)
    case = CaseResult("tiny", "forward", 48, 32, 4, 2, 3, 3, 8, 1.0, 100.0, 10.0, contenders=[ours, slow])
    figures = figures_that_pass()
    figures[demands.V2][demands.DEMANDS[0].key] = demands.Figure(0.01)
    judged = [one.record() for one in demands.judge(figures)]
    machine = harness.machine_record(2, "avx2")
    runs = [("moe_layer", [case], {}), ("decode", [case], {"call_overhead_us": {"tiny": 12.0}})]
    overhead = {"layer": "tiny, BF16", **dict.fromkeys(bench_overhead.HEADINGS[1:], 4.2)}
    runs += [("gemm", gemm_cases(), {}), ("targets", judged, {}), ("overhead", [overhead], {})]
    for bench, cases, more in runs:
        path = harness.save_results(machine, {}, cases, bench=bench, mode="quick", more=more, folder=folder)
    return path


def test_the_page_is_rendered_the_same_every_time_and_holds_every_part(tmp_path):
    record_of_everything(tmp_path)
    notes = tmp_path / "notes.md"
    notes.write_text("## Tried and did not help\n")
    pages = [report.render(tmp_path, notes) for _ in range(2)]
    assert pages[0] == pages[1]
    page = pages[0]
    for part in ("### Targets", "### MoE layer", "### Decoding", "### Single products", "## Tried and did not help"):
        assert part in page
    assert "| tiny, BF16 | 4.2 |" in page
    assert "49 pass, 1 miss, 0 not measurable" in page and "**1%**" in page and "> 9.50" in page
    assert "a call without work takes 12 us" in page
    widths = [line.count(" | ") for line in page.splitlines() if line.startswith("| --- | --- | ---:")]
    assert widths[0] == len(demands.HEADINGS) - 1


def test_parts_of_a_call_add_up_to_all_of_it_but_the_products():
    outer = ("model", "experts", "forward", "submit and join")
    stages = (*outer, "native", "native without rows", "native without tokens")
    times = dict(zip(stages, (100.0, 90.0, 80.0, 50.0, 40.0, 7.0, 3.0), strict=True))
    parts = bench_overhead.overhead_of(times)
    assert parts["overhead"] == 100.0 - (40.0 - 7.0)
    assert sum(parts[name] for name in bench_overhead.PARTS) == pytest.approx(parts["overhead"])


def test_every_stage_of_a_call_gives_the_same_result(tmp_path):
    layer = bench_overhead.Layer("tiny", 4, 2, 64, 32)
    with torch.no_grad():
        outer = bench_overhead.adapted_experts(layer, "INT8", tmp_path)
        calls = bench_overhead.stages(outer, layer)
        outs = [calls[name]() for name in ("model", "experts", "forward", "submit and join")]
        for name in ("native", "native without rows", "native without tokens"):
            calls[name]()  # with arguments that the extension takes
    assert all(torch.equal(out, outs[0]) for out in outs) and outs[0].any()


def test_a_full_run_is_shown_rather_than_a_later_quick_one(tmp_path):
    machine = harness.machine_record(2, "avx2")
    for mode in ("quick", "full", "quick"):
        path = harness.save_results(machine, {}, gemm_cases(), bench="gemm", mode=mode, folder=tmp_path)
    assert report.latest_runs(path.parent)["gemm"][1]["mode"] == "full"


def test_performance_page_is_what_the_results_render():
    assert report.PAGE.read_text() == report.render(), "run `python -m benchmarks.report`"


def test_roofline_picture_is_small(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    picture = plot.draw(gemm_cases(), {"cpu": "CPU"}, tmp_path / "2026-01-01.json")
    assert picture.name == "2026-01-01-roofline.png" and 5_000 < picture.stat().st_size < 200_000


def test_flags_are_those_of_the_library_and_not_of_a_later_build(tmp_path, monkeypatch):
    for tree, kind in (("native", "Release"), ("sanitize-thread", "Sanitize")):
        (tmp_path / "build" / tree).mkdir(parents=True)
        (tmp_path / "build" / tree / "CMakeCache.txt").write_text(f"CMAKE_BUILD_TYPE:STRING={kind}\n")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    assert harness._build_flags() == "CMAKE_BUILD_TYPE=Release"
