"""The runner of planted faults: what it takes for stale, and for seen."""

from __future__ import annotations

import pytest

from scripts.mutants.__main__ import FAULTS, is_of, seen_by
from scripts.mutants.fault import Fault

OUTPUT = """F.
FAILED tests/unit/test_a.py::test_b[x y-1] - AssertionError: FAILED tests/unit/test_z.py
ERROR tests/unit/test_c.py::test_d
1 failed, 1 passed
"""


def fault(**changes) -> Fault:
    values = {"name": "n", "file": "a.py", "old": "x + y", "new": "x", "tests": ("tests/t.py::test_sum[1]",)}
    return Fault(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"old": "x - y"}, "found it 0 times"),
        ({"old": "y"}, "found it 2 times"),
        ({"file": "b.py"}, "b.py: no such file"),
        ({"tests": ("tests/t.py::test_gone",)}, "no such test: tests/t.py::test_gone"),
        ({"tests": ("tests/u.py::test_sum",)}, "no such test: tests/u.py::test_sum"),
    ],
)
def test_a_fault_whose_text_or_test_is_gone_is_stale(tmp_path, changes, why):
    (tmp_path / "tests").mkdir()
    (tmp_path / "a.py").write_text("z = x + y\ny = 2\n")
    (tmp_path / "tests" / "t.py").write_text("def test_sum(n):\n    assert n\n")
    found = fault(**changes).stale(tmp_path)
    assert found is None if why is None else why in found
    if why is None:
        assert fault().planted((tmp_path / "a.py").read_text()) == "z = x\ny = 2\n"


def test_failed_tests_are_those_of_the_summary():
    assert seen_by(OUTPUT) == ["tests/unit/test_a.py::test_b[x y-1]", "tests/unit/test_c.py::test_d"]
    assert is_of("tests/unit/test_a.py::test_b[x-1]", "tests/unit/test_a.py::test_b")
    assert not is_of("tests/unit/test_a.py::test_bc", "tests/unit/test_a.py::test_b")


def test_faults_have_names_and_edits_of_their_own():
    assert (
        len({one.name for one in FAULTS}) == len({(one.file, one.old, one.new) for one in FAULTS}) == len(FAULTS) > 60
    )
    assert all(one.tests and isinstance(one.tests, tuple) and one.old != one.new for one in FAULTS)
