"""The progress bar: it counts, can be switched off in two ways, and needs no transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers.utils import logging as hf_logging

from kt_sft.progress import progress_bar


def use() -> None:
    with progress_bar("Packing", 3, unit="expert") as move:
        for done in (1, 3):
            move(done, 3, "layer")


def test_a_bar_counts_what_is_done(capsys):
    use()
    assert "Packing: 100%" in (shown := capsys.readouterr().err) and "3/3" in shown


@pytest.mark.parametrize(
    ("off", "on"),
    [
        (hf_logging.disable_progress_bar, hf_logging.enable_progress_bar),
        (disable_progress_bars, enable_progress_bars),
    ],
    ids=["transformers", "huggingface_hub"],
)
def test_a_bar_that_is_switched_off_shows_nothing(off, on, capsys):
    off()
    try:
        use()
    finally:
        on()
    assert capsys.readouterr().err == ""


def test_a_bar_loads_neither_transformers_nor_torch():
    code = (
        "import sys\nfrom kt_sft.progress import progress_bar\n"
        "with progress_bar('x', 1, unit='y', is_shown=False) as move:\n    move(1, 1, 'z')\n"
        "print([name for name in ('transformers', 'torch', 'peft') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
