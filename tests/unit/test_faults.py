"""Errors of libraries as ours, and faults under the names of the door."""

from __future__ import annotations

import pytest

from kt_sft.errors import FormatError, OutputError, as_ours, first_line, one_line, under_name
from kt_sft.formats.disk import reporting


def ours(error: BaseException) -> FormatError | None:
    return None if "theirs" in str(error) else FormatError("file", first_line(error))


def test_errors_of_libraries_become_ours_with_their_cause():
    with pytest.raises(FormatError, match="^file: one$") as caught, as_ours(ours):
        raise ValueError("one\ntwo")
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("error", "kinds"),
    [(KeyError("x"), ValueError), (ValueError("theirs"), ValueError), (KeyboardInterrupt(), Exception)],
)
def test_other_errors_stay_what_they_are(error, kinds):
    with pytest.raises(type(error)) as caught, as_ours(ours, kinds):
        raise error
    assert caught.value is error


def test_ours_pass_through_every_other():
    mine = OutputError("disk", "writing", found="full")
    with pytest.raises(OutputError) as caught, as_ours(ours), reporting("elsewhere"):
        raise mine
    assert caught.value is mine


def test_an_error_that_says_nothing_says_its_type():
    assert first_line(KeyError()) == one_line(KeyError()) == "KeyError"
    assert first_line(ValueError("\n a\nb")) == "a" and one_line(ValueError(" a\n b")) == "a b"


def test_a_fault_has_the_name_of_the_door():
    assert under_name("threads: expected 1: found 0", {"threads": "cpu_infer"}) == "cpu_infer: expected 1: found 0"
    assert under_name("no setting", {"threads": "cpu_infer"}) == "no setting"
