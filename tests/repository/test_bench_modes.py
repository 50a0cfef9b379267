"""Runs of benchmarks that leave something out do not take the place of whole ones; nothing is measured."""

from __future__ import annotations

import pytest

from benchmarks import bench_decode, bench_gemm, bench_moe_layer, harness, report, targets


@pytest.mark.parametrize(
    ("bench", "words"),
    [
        (targets, ["--only", "INT8"]),
        (targets, ["--models", "qwen3-30b-a3b"]),
        (bench_decode, ["--models", "qwen3-30b-a3b"]),
        (bench_moe_layer, ["--models", "qwen3-30b-a3b"]),
        (bench_moe_layer, ["--tokens", "16"]),
        (bench_moe_layer, ["--full", "--tokens", "16", "512"]),
        (bench_moe_layer, ["--formats", "int8"]),
        (bench_moe_layer, ["--opponents"]),
        (bench_gemm, ["--models", "qwen3-30b-a3b"]),
        (bench_gemm, ["--full", "--models", "qwen3-30b-a3b"]),
        (bench_gemm, ["--kernels", "s8"]),
        (bench_gemm, ["--rows", "1"]),
    ],
)
def test_runs_that_leave_something_out_say_so(bench, words):
    assert bench.mode_of(bench.parse_arguments(words)) == "part"
    assert [bench.mode_of(bench.parse_arguments(given)) for given in ([], ["--full"])] == ["quick", "full"]


def test_a_run_that_left_something_out_is_shown_only_for_want_of_another(tmp_path):
    machine = harness.machine_record(2, "avx2")
    shown = []
    for mode in ("part", "quick", "part", "full", "part"):
        path = harness.save_results(machine, {}, [], bench="gemm", mode=mode, folder=tmp_path)
        shown.append(report.latest_runs(path.parent)["gemm"][1]["mode"])
    assert shown == ["part", "quick", "quick", "full", "full"]
