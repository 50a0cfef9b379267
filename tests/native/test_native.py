"""Runs the C++ tests: what Python cannot see."""

from __future__ import annotations

import subprocess


def test_native(kts_tests):
    done = subprocess.run([kts_tests], capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "0 failed" in done.stdout
