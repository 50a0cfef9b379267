"""Runs the C++ tests: what Python cannot see."""

from __future__ import annotations

import subprocess

import pytest


def test_native(kts_tests):
    done = subprocess.run([kts_tests], capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "0 failed" in done.stdout


@pytest.mark.amx
def test_every_row_runs_where_there_is_amx(kts_tests):
    """AMX comes with VNNI and AVX512-BF16: no row may be left out, and the tile model equals the instructions."""
    for case in ("rows_of_absent_isas_are_named", "tile_model_equals_the_instructions"):
        done = subprocess.run([kts_tests, case], capture_output=True, text=True, timeout=600)
        assert f"ok   {case}" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
