"""The benchmark harness: its statistics, its schedule and its file, on made-up times; no speed is asserted here."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import harness, moe_layer
from benchmarks.harness import CaseResult, Contender, Sample, Work
from benchmarks.roofline import Limits

SHAPE = moe_layer.LayerShape("tiny", hidden=48, inter=32, num_experts=4, top_k=2)


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
    case = CaseResult("tiny", "forward", 48, 32, 4, 2, 3, 3, 8, 1.0, 100.0, 10.0, [ours])
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
    layer = moe_layer.make_layer(SHAPE, rank=8)
    (batch,) = moe_layer.make_batches(SHAPE, tokens=5, count=1)
    reference = moe_layer.answers(moe_layer.exact_layer(layer), batch)
    got = moe_layer.answers(moe_layer.torch_contenders(layer)[name], batch)
    assert moe_layer.worst_error(got, reference) < (1e-5 if "fp32" in name else 3e-2)
    broken = [got[0] * 1.1, *got[1:]]
    assert moe_layer.worst_error(broken, reference) > 5e-2


def test_worst_error_treats_nan_as_wrong():
    assert moe_layer.worst_error([torch.tensor([math.nan])], [torch.tensor([1.0])]) == math.inf


def test_a_slice_keeps_the_rows_per_expert_of_the_whole_layer():
    bench = pytest.importorskip("benchmarks.bench_moe_layer")
    for model in bench.MODELS.values():
        rows = 512 * model.whole.top_k / model.whole.num_experts
        assert model.slice_tokens(512) * model.slice.top_k / model.slice.num_experts == pytest.approx(rows, rel=0.05)
        assert (model.slice.hidden, model.slice.inter) == (model.whole.hidden, model.whole.inter)
