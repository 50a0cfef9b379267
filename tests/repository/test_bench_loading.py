"""What bench_loading makes of its measurements, and how it counts memory; no model is loaded, no speed asserted."""

from __future__ import annotations

import mmap

import torch

from benchmarks import bench_loading, checkpoints, harness, loading_worker, report


def loading_case(**changes):
    load = {"seconds": 0.2, "experts_seconds": 0.01, "linears_seconds": 0.0, "linears_bytes": 0}
    load |= {"fresh_memory_seconds": 0.0, "first_pass_seconds": 0.5}
    packed = load | {"seconds": 2.4, "linears_seconds": 2.2, "linears_bytes": 1 << 30, "fresh_memory_seconds": 2.0}
    case = {"model": "tiny", "layers": 2, "source": "fp8", "source_bytes": 3 << 30, "method": "int8"}
    case |= {"convert": {"seconds": 12.0, "peak_kib": 1 << 20, "bytes": 2 << 30, "errors": {}}}
    case |= {"load": {"bf16": packed, "off": load}, "alone_kib": [4096, 4096]}
    case |= {"two_processes_kib": [{"Rss": 4096, "Pss": 2048}] * 2}
    return case | changes


def test_loading_misses_its_targets_one_by_one():
    good = loading_case()
    assert bench_loading.misses(good) == []
    greedy = loading_case(convert=good["convert"] | {"peak_kib": 2 << 20})
    slow = loading_case(load={"bf16": good["load"]["bf16"] | {"seconds": 3.5}, "off": good["load"]["off"]})
    alone = loading_case(two_processes_kib=[{"Rss": 4096, "Pss": 4096}] * 2)
    assert ["peak 2.00 GiB" in one for one in bench_loading.misses(greedy)] == [True]
    assert ["cpu_linear bf16 3.50 s" in one for one in bench_loading.misses(slow)] == [True]
    assert ["not shared" in one for one in bench_loading.misses(alone)] == [True, True]


def test_loading_table_has_a_cell_for_each_heading():
    (row,) = bench_loading.rows_of([loading_case()])
    assert len(row) == len(bench_loading.HEADINGS)
    assert row == ["int8", "2.00", "256", "1.00", "0.20", "0.50", "2.40", "2.20", "2.00", "4, 2; 4, 2"]


def test_the_page_has_a_section_on_loading(tmp_path):
    harness.save_results(
        harness.machine_record(2, "avx2"), {}, [loading_case()], bench="loading", mode="2 layers", folder=tmp_path
    )
    notes = tmp_path / "notes.md"
    notes.write_text("")
    page = report.render(tmp_path, notes)
    assert "### Converting and loading\n" in page and "tiny, 2 MoE layers, experts of 3.00 GiB in fp8" in page
    assert "| int8 | 2.00 | 256 |" in page


def test_fp8_checkpoint_holds_blocks_of_128_with_a_scale_each():
    w = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, scale = checkpoints.stored("w", w, "fp8").values()
    restored = (q.float().view(2, 128, 1, 128) * scale[:, None, :, None]).view(w.shape)
    assert scale.shape == (2, 1) and ((restored - w).norm() / w.norm()).item() < 0.04


def test_mappings_below_a_folder_are_counted(tmp_path):
    path = tmp_path / "blob"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[at] for at in range(0, len(mapped), 4096)) == 0
        assert loading_worker.mapped_kib(tmp_path, "Rss") == 1024
        assert loading_worker.mapped_kib(tmp_path / "other", "Rss") == 0
    assert loading_worker.fresh_memory_seconds(1 << 21) > 0
