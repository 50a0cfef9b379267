"""`kt-sft doctor --kernels`: the row that each product takes, and why each other row of the table is not it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from kt_sft.cli import app
from kt_sft.doctor import PRODUCTS, kernel_choices
from kt_sft.errors import ConfigError
from kt_sft.native import native

MS = (1, 4, 5, 64)


@pytest.fixture(autouse=True, params=["auto", "avx2", "scalar"])
def level(request, monkeypatch):
    """Every test runs narrowed, too, as a user narrows it."""
    monkeypatch.delenv("KT_SFT_ISA", raising=False)
    if request.param != "auto":
        if request.param not in native().isa_detected():
            pytest.skip(f"this CPU lacks {request.param}")
        monkeypatch.setenv("KT_SFT_ISA", request.param)
    native().set_isa("auto")
    yield request.param
    native().set_isa("auto")


def invoke(*arguments):
    return CliRunner().invoke(app, ["doctor", "--kernels", *arguments])


def test_every_row_of_the_table_is_chosen_dearer_or_out_for_a_reason(level):
    table = {row["name"]: row for row in native().kernel_rows()}
    for choice in kernel_choices(None, MS, n=96, k=256):
        for m, verdicts in choice.verdicts.items():
            chosen = choice.chosen(m)
            able = [row for row in verdicts if not row["refusal"]]
            assert chosen["cycles"] == min(row["cycles"] for row in able) and chosen in able
            assert [row["cycles"] for row in choice.runners_up(m)] == sorted(
                row["cycles"] for row in able if row is not chosen
            )
            for row in verdicts:
                of_table = table[row["name"]]
                assert of_table["op"] == choice.op
                if row["refusal"] == "cpu":
                    assert row["isa"] not in native().isa_detected()
                elif row["refusal"] == "narrowed":
                    assert level != "auto" and row["isa"] in native().isa_detected()
                elif row["refusal"] == "max_m":
                    assert 0 < row["max_m"] < m
                elif row["refusal"] == "rows":
                    assert row["rows"] != choice.rows
                else:
                    assert row["refusal"] == ""
            if level == "scalar":
                assert chosen["isa"] == "scalar"


def test_every_kind_of_weights_and_rows_is_shown():
    shown = {(choice.weights, choice.op, choice.rows) for choice in kernel_choices(None, [1], n=32, k=256)}
    kinds = {row["format"] for row in native().kernel_rows()}
    assert len({weights for weights, _, _ in shown}) == len(kinds)
    assert {(op, rows) for _, op, rows in shown} <= set(PRODUCTS)
    assert {("int8", "forward", "int8"), ("int8", "input_grad", "bf16"), ("bf16", "forward", "bf16")} <= shown
    assert not {row for row in shown if row[0] == "bf16" and row[2] != "bf16"}


def test_cycles_grow_with_the_weights():
    def cycles(n, k):
        return kernel_choices(["int4"], [16], n=n, k=k)[0].chosen(16)["cycles"]

    assert cycles(64, 512) == pytest.approx(2 * cycles(32, 512)) == pytest.approx(2 * cycles(64, 256))
    assert cycles(33, 512) == cycles(64, 512)  # a panel that is not full is computed whole


def test_table_fits_a_terminal_of_80_columns(level):
    text = invoke().stdout
    assert max(map(len, text.splitlines())) <= 80
    for choice in kernel_choices(None, (1, 4, 16, 64, 512), n=1408, k=2048):
        head = f"{choice.weights} weights, {choice.rows} rows, "
        assert head in text
        for m in choice.verdicts:
            assert choice.chosen(m)["name"] in text
    assert "for more than 4 rows" in text if level != "scalar" else "above the level scalar" in text


def test_options_pick_formats_rows_and_sizes():
    result = invoke("--formats", "int8, q4_k", "--m", "3", "--n", "64", "--k", "256")
    assert result.exit_code == 0 and "[n = 64, k = 256]" in " ".join(result.stdout.split())
    heads = [line for line in result.stdout.splitlines() if " weights, " in line]
    assert {line.split(" ")[0] for line in heads} == {"int8", "q4_k"}
    report = json.loads(invoke("--json", "--formats", "bf16", "--m", "1,512").stdout)
    assert report["isa"] == native().isa_active() and (report["n"], report["k"]) == (1408, 2048)
    assert [(one["op"], sorted(one["verdicts"])) for one in report["choices"]] == [
        ("forward", ["1", "512"]),
        ("input_grad", ["1", "512"]),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--m", "0"), "m: expected whole numbers from 1"),
        (("--m", "1,x"), "m: expected whole numbers separated by commas, found 'x'"),
        (("--n", "0"), "n: expected whole numbers from 1"),
        (("--k", str(1 << 40)), "k: expected whole numbers from 1"),
        (("--formats", "int9"), "got int9"),
        (("--formats", ""), "format: expected bf16"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(arguments, words):
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert words in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_level_that_the_cpu_lacks_is_refused(monkeypatch):
    monkeypatch.setenv("KT_SFT_ISA", "sse9")
    with pytest.raises(ConfigError, match="isa: expected one of auto"):
        kernel_choices(["bf16"], [1], n=32, k=32)


def test_a_product_without_a_kernel_says_why():
    text = CliRunner().invoke(app, ["doctor", "--kernels", "--formats", "int8", "--k", "40000"]).output
    part = text[text.index("int8 weights, int8 rows") :]
    assert "none" in part.splitlines()[2] and "out, int8 rows are too long" in part


def test_blocks_fill_rows():
    done = CliRunner().invoke(app, ["doctor", "--kernels", "--formats", "q4_k", "--k", "100"])
    assert done.exit_code == 2 and "q4_k" in done.output and "256" in done.output
