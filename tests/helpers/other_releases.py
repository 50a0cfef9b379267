"""Packages of other versions than the environment's, installed into a folder of their own for a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def install(folder: Path, *requirements: str) -> Path:
    """Install without dependencies; skips the test where the package index cannot be reached or has no such wheel."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--target", str(folder), *requirements], capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        pytest.skip(f"{', '.join(requirements)} cannot be installed here: {reason}")
    return folder


def run(folder: Path, *words: object, code: str | None = None) -> str:
    """Run Python with that folder before all others; `code` as its program. Returns what it printed."""
    program = ["-c", code] if code is not None else []
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, *program, *map(str, words)], capture_output=True, text=True, env=environment, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
