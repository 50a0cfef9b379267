"""`python -m kt_sft.cli`."""

from kt_sft.cli import app

app()
