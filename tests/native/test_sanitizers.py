"""`make sanitize` is clean, and a finding would end it with an error."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["address", "undefined", "thread"])
def test_native_tests_are_clean(name):
    done = subprocess.run([ROOT / "packaging" / "sanitize.sh", name], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"sanitize {name}: 0 reports, status 0; native tests:" in done.stdout
    if name != "thread":
        assert f"sanitize {name}: 0 reports, status 0; random calls: " in done.stdout
