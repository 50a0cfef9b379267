"""The AVX-512 machine code on a CPU without AVX-512: kts_tests in an emulated PC (docs/testing_avx512.md)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kt_sft.native import native

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulated"
TOOLS = ("bochs", "xorriso", "cpio", "script")


@pytest.mark.slow
def test_avx512_rows_in_the_emulator():
    if "avx512" in native().isa_detected():
        pytest.skip("this CPU has AVX-512: tests/native ran these rows directly")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"the emulator needs {', '.join(missing)}: docs/testing_avx512.md names the packages")
    cmake = [sys.executable, "-m", "cmake"]
    options = ["-DKTS_PYTHON=OFF", "-DKTS_TESTS=ON", "-DCMAKE_EXE_LINKER_FLAGS=-static"]
    subprocess.run([*cmake, "-S", ROOT / "native", "-B", BUILD, *options], check=True, capture_output=True)
    subprocess.run([*cmake, "--build", BUILD, "--target", "kts_tests"], check=True, capture_output=True)
    run = [ROOT / "tests" / "emulator" / "run_avx512.sh", BUILD / "kts_tests"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=1800)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "ok   rows_of_absent_isas_are_named" in done.stdout and "0 failed, 0 skipped" in done.stdout
