"""What bench_generate makes of its measurements; no model is loaded, no speed asserted."""

from __future__ import annotations

from benchmarks import bench_generate, harness, report


def generate_case(**changes):
    ours = {"name": bench_generate.OURS, "median_ms": 20.0, "tokens_per_second": 50.0, "ratio": 1.0, "first": 0.25}
    bf16 = ours | {"name": bench_generate.TORCH_BF16, "median_ms": 80.0, "tokens_per_second": 12.5, "ratio": 4.0}
    fp32 = bf16 | {"name": bench_generate.TORCH_FP32, "ratio": 2.5}
    contenders = [one | {"dram_fraction": 0.7} for one in (ours, bf16, fp32)]
    case = {"model": "tiny", "layers": 2, "vocab_size": 99, "prompt": 64, "tokens": 24, "contenders": contenders}
    return case | changes


def test_generation_misses_its_targets_one_by_one():
    good = generate_case()
    assert bench_generate.misses(good) == []
    ours, bf16, fp32 = good["contenders"]
    slow = generate_case(contenders=[ours, bf16 | {"ratio": 2.9}, fp32])
    assert bench_generate.misses(slow) == ["transformers eager, bf16: 2.90 x, wanted 3 x"]


def test_the_page_has_a_section_on_generation(tmp_path):
    cases = [generate_case(), generate_case(model="demo")]
    harness.save_results(
        harness.machine_record(2, "avx2"), {}, cases, bench="generate", mode="2 layers", folder=tmp_path
    )
    notes = tmp_path / "notes.md"
    notes.write_text("")
    page = report.render(tmp_path, notes)
    assert "### Generation with whole models\n" in page
    assert page.index("**tiny, 2 layers, vocabulary 99") < page.index("**demo, 2 layers, vocabulary 99")
    assert page.count("| transformers eager, bf16 | 12.5 | 80.0 | 4.00 x | 70% | 0.25 |") == 2
    headings = next(line for line in page.splitlines() if "ms per token" in line)
    assert headings.count(" | ") == len(bench_generate.HEADINGS) - 1
