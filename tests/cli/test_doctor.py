"""`kt-sft doctor`: every illness gets a line with its remedy, and the exit code follows the errors."""

from __future__ import annotations

import importlib.metadata
import json
import re

import pytest
from typer.testing import CliRunner

from kt_sft import doctor, memory
from kt_sft.cli import app
from kt_sft.native import NativeMissing, native

NO_LIBRARY = NativeMissing("the compiled kernels kt_sft._native cannot be imported (no such file); build them")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("USE_KT", "KT_SFT_ISA", "KT_SFT_THREADS", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def isa_restored():
    yield
    native().set_isa("auto")


def without_library(monkeypatch):
    def missing():
        raise NO_LIBRARY

    monkeypatch.setattr("kt_sft.native.native", missing)


def pretend_versions(monkeypatch, **versions):
    """Make the named distributions report these versions; None = not installed."""
    real = importlib.metadata.version

    def version(name):
        if name in versions:
            if versions[name] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def findings(report, level=None):
    return [f"{f.what} -> {f.remedy}" for f in report.findings if level in (None, f.level)]


def test_json_holds_every_topic_and_the_exit_code_agrees():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == (0 if report["ok"] else 1)
    assert {"machine", "kernels", "gpus", "versions", "hook", "environment", "findings"} <= set(report)
    assert report["machine"]["memory"]["available_gib"] > 0
    assert [row["name"] for row in report["kernels"]["rows"] if row["selected"]]
    assert {"python", "kt_sft", "torch", "transformers", "peft", "accelerate", "llamafactory"} <= {
        v["name"] for v in report["versions"]
    }


def test_tables_show_cpu_kernels_versions_and_verdict():
    result = CliRunner().invoke(app, ["doctor"])
    report = doctor.collect()
    for text in ("NUMA nodes", "memory", "gemm_bf16", "transformers", "LLaMA-Factory hook", "kt-sft doctor:"):
        assert text in result.stdout
    assert report.machine["model_name"].split()[0] in result.stdout


def test_kernels_are_one_line_for_each_format_and_product_and_all_of_them_on_request(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    rows = doctor.collect().kernels["rows"]
    short = CliRunner().invoke(app, ["doctor"]).stdout
    long = CliRunner().invoke(app, ["doctor", "--verbose"]).stdout
    assert [row["name"] for row in rows if row["name"] not in long] == []
    shown = set(re.findall(r"\w+", short))  # whole names: gemv_... is a part of dgemv_..., ..._avx512 of ..._avx512vnni
    assert [row["name"] for row in rows if (row["name"] in shown) != row["selected"]] == []
    products = {(row["format"], row["rows"], row["op"]) for row in rows}
    lines = [line for line in short.splitlines() if line.startswith("│ ") and "_f32_" in line]
    assert len(products) == len(lines) == 24


def test_amx_reason_and_inference_activations_are_reported(monkeypatch):
    assert doctor.collect().kernels["inference_activations"] == {
        name: native().default_rows(name) for name in ("bf16", "int8", "int4")
    }
    assert f"AMX: {native().amx_refusal() or 'yes'}" in " ".join(CliRunner().invoke(app, ["doctor"]).stdout.split())
    refused = "the operating system refused the tile state (Linux 5.16 or later is needed)"
    monkeypatch.setattr(native(), "amx_refusal", lambda: refused)
    assert [text for text in findings(doctor.collect(), "warning") if refused in text and "5.16" in text]


def test_every_finding_has_a_remedy_on_one_line():
    for finding in doctor.collect().findings:
        assert finding.remedy and "\n" not in finding.what + finding.remedy


def test_missing_library_is_an_error_that_says_how_to_build(monkeypatch):
    without_library(monkeypatch)
    report = doctor.collect()
    assert not report.ok
    assert [text for text in findings(report, "error") if "native library is missing" in text and "make setup" in text]
    assert report.machine["model_name"] and report.machine["logical_cpus"] >= 1
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1 and "not ready" in result.stdout


def test_missing_llamafactory_is_no_error(monkeypatch):
    pretend_versions(monkeypatch, llamafactory=None)
    report = doctor.collect()
    assert [
        text for text in findings(report, "note") if "LLaMA-Factory is not installed" in text and "pip install" in text
    ]
    assert not [text for text in findings(report, "error") if "llamafactory" in text.lower()]


def test_missing_or_old_transformers_is_an_error_with_the_range(monkeypatch):
    for version in (None, "4.40.0"):
        with monkeypatch.context() as patch:
            pretend_versions(patch, transformers=version)
            report = doctor.collect()
        errors = [text for text in findings(report, "error") if text.startswith("transformers")]
        assert not report.ok and len(errors) == 1 and "pip install" in errors[0] and ">=5.6" in errors[0]


def test_hook_reason_without_use_kt_is_a_note_and_with_autoload_off_a_warning(monkeypatch):
    assert [text for text in findings(doctor.collect(), "note") if "USE_KT" in text]
    monkeypatch.setenv("USE_KT", "1")
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    report = doctor.collect()
    assert [text for text in findings(report, "warning") if "TORCH_DEVICE_BACKEND_AUTOLOAD" in text]
    assert report.environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"


def test_isa_that_the_cpu_lacks_or_nobody_knows_is_an_error(monkeypatch):
    monkeypatch.setenv("KT_SFT_ISA", "mmx")
    report = doctor.collect()
    assert [text for text in findings(report, "error") if "KT_SFT_ISA=mmx" in text and "scalar" in text]


def test_narrowing_to_scalar_is_shown_and_warned_about(monkeypatch):
    monkeypatch.setenv("KT_SFT_ISA", "scalar")
    report = doctor.collect()
    assert {row["isa"] for row in report.kernels["rows"] if row["selected"]} == {"scalar"}
    assert [text for text in findings(report) if "scalar" in text]


def test_thread_count_that_is_no_number_is_an_error(monkeypatch):
    monkeypatch.setenv("KT_SFT_THREADS", "many")
    assert [text for text in findings(doctor.collect(), "error") if "KT_SFT_THREADS" in text]


def test_little_memory_is_a_warning_that_names_the_limit(monkeypatch):
    monkeypatch.setattr(
        memory, "available_memory", lambda: memory.AvailableMemory(1 << 30, "the cgroup's memory limit")
    )
    assert [text for text in findings(doctor.collect(), "warning") if "1.00 GiB" in text and "cgroup" in text]


def test_check_that_breaks_becomes_a_finding(monkeypatch):
    def broken():
        raise RuntimeError("expected a MemAvailable line")

    monkeypatch.setattr(memory, "available_memory", broken)
    report = doctor.collect()
    assert [text for text in findings(report, "error") if "MemAvailable" in text]
    assert report.versions and report.hook
