"""What a run of LLaMA-Factory shows: every line of ours says that it is, and comes once where several ranks have it."""

from __future__ import annotations

import logging
import sys

import pytest

from kt_sft.errors import ConfigError
from kt_sft.integrations.llamafactory import reporting


@pytest.fixture
def program(monkeypatch):
    """Makes this process a program with these handlers of logging; pytest adds its own after fixtures have run."""

    def start(*handlers: logging.Handler) -> None:
        monkeypatch.setattr(logging.getLogger(), "handlers", list(handlers))
        monkeypatch.setattr(logging.getLogger("kt_sft"), "handlers", [])
        reporting.show_lines()
        reporting.show_lines()

    return start


def test_every_warning_says_where_it_comes_from(program, capsys):
    program()
    logging.getLogger("kt_sft.integrations.canary.callback").warning("canary: step %d", 1)
    logging.getLogger("kt_sft.integrations.llamafactory.hook").warning("kt_sft: said already")
    logging.getLogger("kt_sft.cli").info("not shown")
    assert capsys.readouterr().err.splitlines() == ["kt_sft: canary: step 1", "kt_sft: said already"]


def test_other_ranks_say_errors_only(program, capsys, monkeypatch):
    program()
    monkeypatch.setenv("LOCAL_RANK", "1")
    logging.getLogger("kt_sft.x").warning("of every rank")
    logging.getLogger("kt_sft.x").error("of this one")
    assert capsys.readouterr().err.splitlines() == ["kt_sft: of this one"]


def test_handlers_of_the_program_have_the_say(program, capsys):
    program(logging.NullHandler())
    logging.getLogger("kt_sft.x").warning("theirs")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [reporting._MOMENT_SECONDS])])
def test_a_fault_of_all_ranks_is_said_by_the_first(monkeypatch, capsys, rank, waits):
    """torchrun ends the others while they wait; what only one of them has is said by it afterwards."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("LOCAL_RANK", rank)
    waited = []
    monkeypatch.setattr(reporting.time, "sleep", waited.append)
    reporting.report_errors_in_one_line()
    with pytest.raises(SystemExit) as left:
        sys.excepthook(ConfigError, ConfigError("a fault"), None)
    assert left.value.code == 2 and waited == waits
    assert capsys.readouterr().err == "kt_sft: error: a fault\n"
