"""Builds the C++ tests and the static library once for all tests of this folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OF_LIBRARY = ROOT / "build" / "native"  # where setup.py has built the extension
BUILD = ROOT / "build" / "native_tests"


@pytest.fixture(scope="session")
def kts_tests() -> Path:
    # The library of the extension is there already: compiling it again would take minutes on two cores.
    if (OF_LIBRARY / "build.ninja").is_file():
        return _build(OF_LIBRARY, [*_cmake(), "-S", ROOT / "native", "-B", OF_LIBRARY, "-DKTS_TESTS=ON"])
    ninja = shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    source = ["-S", ROOT / "native", "-B", BUILD, *generator]
    return _build(BUILD, [*_cmake(), *source, "-DKTS_TESTS=ON", "-DKTS_PYTHON=OFF"])


def _build(folder: Path, configure: list[str | Path]) -> Path:
    # The tests link a library with contracts; what is looked at is the one that the extension links.
    for command in (configure, [*_cmake(), "--build", folder, "--target", "kts", "kts_tests"]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return folder / "kts_tests"


def _cmake() -> list[str]:
    return [sys.executable, "-m", "cmake"] if _has_module("cmake") else [shutil.which("cmake") or "cmake"]


@pytest.fixture(scope="session")
def static_library(kts_tests: Path) -> Path:
    """The native code with symbols; the extension links the same objects and is stripped."""
    return kts_tests.parent / "libkts.a"


def _has_module(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0
