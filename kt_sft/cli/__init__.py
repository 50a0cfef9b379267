"""The command `kt-sft`; each subcommand shows what another module found out."""

from __future__ import annotations

from typing import Annotated

import typer

import kt_sft
from kt_sft.cli import adapter, convert, doctor, plan, serve

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kt-sft {kt_sft.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fine-tuning of mixture-of-experts models with the routed experts in CPU kernels."""


app.command()(doctor.doctor)
app.command()(plan.plan)
app.command()(convert.convert)
app.command()(serve.serve)
app.add_typer(serve.bench_app, name="bench")
app.add_typer(adapter.app, name="adapter")
app.command()(adapter.merge)
