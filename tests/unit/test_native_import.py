"""The import of the compiled library when it fails."""

from __future__ import annotations

import sys

import pytest

import kt_sft
from kt_sft import native as importing


class Failing:
    """Finds `kt_sft._native` and fails as pybind11 does when an exception ends its start."""

    def __init__(self, cause):
        self.cause = cause

    def find_spec(self, name, path=None, target=None):
        if name == "kt_sft._native":
            raise ImportError("initialization failed") from self.cause
        return None


@pytest.mark.parametrize(("cause", "expected"), [
    (KeyboardInterrupt(), KeyboardInterrupt), (None, importing.NativeMissing), (OSError("x"), importing.NativeMissing),
])  # fmt: skip
def test_interrupted_is_not_missing(monkeypatch, cause, expected):
    monkeypatch.setattr(importing, "_module", None)
    monkeypatch.delitem(sys.modules, "kt_sft._native", raising=False)
    monkeypatch.delattr(kt_sft, "_native", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Failing(cause), *sys.meta_path])
    with pytest.raises(expected):
        importing.native()
