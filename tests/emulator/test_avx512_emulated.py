"""Machine code for instructions that this CPU lacks, executed all the same (docs/testing_avx512.md).

- AVX-512: kts_tests in an emulated PC.
- AMX, AVX512-BF16, VNNI: amx_sigill.cc and its neighbours, which execute them on the registers of a CPU (or an emulated
  PC) with AVX-512.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kt_sft.native import native

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulated"
EMULATOR = ROOT / "tests" / "emulator"  # all its C++ files are the one library
TOOLS = ("bochs", "xorriso", "cpio", "script")
CASES_OF_EVERY_ROW = (
    "rows_of_absent_isas_are_named",
    "tile_model_equals_the_instructions",
    "emulated_counts_pass_the_gates",
)
EMULATED_LEVELS = ("avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def build_tests(folder: Path, *options: str) -> Path:
    cmake = [sys.executable, "-m", "cmake"]
    options = ("-DKTS_PYTHON=OFF", "-DKTS_TESTS=ON", *options)
    subprocess.run([*cmake, "-S", ROOT / "native", "-B", folder, *options], check=True, capture_output=True)
    subprocess.run([*cmake, "--build", folder, "--target", "kts_tests"], check=True, capture_output=True)
    return folder / "kts_tests"


def build_preload(library: Path) -> Path:
    """The emulator as a shared library for LD_PRELOAD."""
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O2", "-shared", "-fPIC"]
    subprocess.run([*command, *sorted(EMULATOR.glob("*.cc")), "-o", library], check=True)
    return library


def assert_every_row_ran(output: str) -> None:
    """No failure, and no case that names rows or instructions as absent."""
    assert "0 failed, 0 skipped" in output, output[-3000:]
    for case in CASES_OF_EVERY_ROW:
        assert f"ok   {case}" in output, output[-3000:]


@pytest.mark.slow
def test_every_row_in_the_emulated_pc():
    if "avx512" in native().isa_detected():
        pytest.skip("this CPU has AVX-512: the other test runs the same code much faster")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"the emulator needs {', '.join(missing)}: docs/testing_avx512.md names the packages")
    binary = build_tests(BUILD, "-DKTS_EMULATE=ON", "-DCMAKE_EXE_LINKER_FLAGS=-static")
    run = [ROOT / "tests" / "emulator" / "run_avx512.sh", binary]
    done = subprocess.run(
        run, capture_output=True, text=True, timeout=7200, env={**os.environ, "AVX512_TIMEOUT": "7000"}
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert_every_row_ran(done.stdout)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The emulator for a CPU that has AVX-512 but not all that comes later."""
    if "avx512" not in native().isa_detected():
        pytest.skip("this CPU has no AVX-512, whose registers the emulated instructions work on")
    if all(level in native().isa_detected() for level in EMULATED_LEVELS):
        pytest.skip("this CPU has AMX, AVX512-BF16 and VNNI: tests/native and tests/numerics run their rows")
    return build_preload(tmp_path_factory.mktemp("emulator") / "amx_sigill.so")


@pytest.mark.slow
def test_every_row_with_the_preloaded_emulator(library):
    done = subprocess.run(
        [build_tests(ROOT / "build" / "preloaded")],
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, "LD_PRELOAD": str(library)},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert_every_row_ran(done.stdout)


@pytest.mark.slow
def test_layers_on_amx_with_the_preloaded_emulator(library):
    """Output and gradients of whole layers; pytest's handler of crashes would take the signals of the emulator."""
    words = ["-p", "no:faulthandler", "-p", "no:cacheprovider", "-q", "-rs", "-m", "amx", "tests/numerics"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"^\d{3,} passed, \d+ deselected", done.stdout, re.MULTILINE), done.stdout[-2000:]
