"""Contracts of the kernels (KTS_DCHECK) are on in the library that the tests link and off in the shipped one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kt_sft.native import native


def symbols(library: Path) -> str:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    return subprocess.run(["nm", "-C", str(library)], capture_output=True, text=True, check=True).stdout


def users(listing: str) -> int:
    return len(re.findall(r"^\s+U kts::broken_contract\(", listing, re.MULTILINE))


def test_the_shipped_library_has_no_contracts(static_library, kts_tests):
    assert users(symbols(static_library)) == 0
    assert b"broken contract: " in Path(kts_tests).read_bytes()
    assert b"task.panel_begin" in Path(kts_tests).read_bytes()
    assert b"task.panel_begin" not in Path(native().__file__).read_bytes()


def test_the_library_of_the_tests_shares_no_code_that_was_compiled_for_an_isa(kts_tests):
    """A contract must not make a compiler put a member of a view out of line, where the linker would share it."""
    shared = [
        line for line in symbols(kts_tests.parent / "libkts_contracts.a").splitlines() if " W kts::Packed" in line
    ]
    assert not shared
