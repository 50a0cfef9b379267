"""`kt-sft adapter convert`, `kt-sft adapter inspect` and `kt-sft merge`: adapters and models for other engines."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kt_sft.cli.console import errors_in_one_line, path, progress_bar

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Adapters: what they hold, and other forms of them.")
_BASE = typer.Option("--base-model", help="Directory of the base model; default: the one that the adapter names.")

_TRUST = typer.Option("--trust-remote-code", help="Let the code beside the model's config.json run.")


@app.command("convert")
def convert_adapter(
    source: Annotated[
        Path, typer.Argument(parser=path, metavar="IN", help="Adapter directory of any form, or GGUF adapter.")
    ],
    output: Annotated[
        Path, typer.Argument(parser=path, metavar="OUT", help="New directory; for gguf a file or a directory.")
    ],
    to: Annotated[str, typer.Option(help="peft-0.18, peft-0.19, vllm, sglang or gguf.")],
    base_model: Annotated[str | None, _BASE] = None,
    trust_remote_code: Annotated[bool, _TRUST] = False,
) -> None:
    """Write an adapter in the form that another engine or another release of PEFT reads.

    Written aside and renamed; exit code 2 on errors, and then nothing is left.
    """
    with errors_in_one_line("adapter convert"):
        from kt_sft.adapters.forms import convert
        from kt_sft.integrations.merge.inspecting import open_with_base

        adapter = open_with_base(source, base_model, trust_remote_code=trust_remote_code)
        written = convert(adapter, to, output)
        held = f"{len(adapter.experts)} layers of experts, {len(adapter.linears)} linear layers"
        Console().print(escape(f"{written}: {adapter.form} -> {to}, {held}"), soft_wrap=True)


@app.command("inspect")
def inspect_adapter(
    source: Annotated[
        Path, typer.Argument(parser=path, metavar="IN", help="Adapter directory of any form, or GGUF adapter.")
    ],
    base_model: Annotated[str | None, _BASE] = None,
    trust_remote_code: Annotated[bool, _TRUST] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say what an adapter holds: form, base model, ranks, scales, targets, sizes of the deltas, and what is wrong.

    Exit code 1 if something is wrong with it, 2 if it cannot be read at all.
    """
    with errors_in_one_line("adapter inspect"):
        from kt_sft.integrations.merge.inspecting import inspect

        report = inspect(source, base_model, trust_remote_code=trust_remote_code)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _show(report.to_dict(), Console())
    raise typer.Exit(1 if report.problems else 0)


def merge(
    adapter: Annotated[
        list[Path], typer.Option(parser=path, help="Adapter of any form; given several times, all are added.")
    ],
    output: Annotated[Path, typer.Option(parser=path, help="New directory; for GGUF a file or a directory.")],
    model: Annotated[
        Path | None, typer.Option(parser=path, help="Directory of the base model; default: the adapter's own.")
    ] = None,
    to: Annotated[str, typer.Option(help="hf, gguf-q8_0 or gguf-bf16.")] = "hf",
    trust_remote_code: Annotated[bool, _TRUST] = False,
) -> None:
    """Merge adapters into a checkpoint, tensor by tensor: the model is never loaded.

    Written aside and renamed; exit code 2 on errors, and then nothing is left.
    """
    with errors_in_one_line("merge"):
        from kt_sft.integrations.merge.command import merge as merge_into

        console = Console()
        bar = partial(progress_bar, console)
        written = merge_into(model, adapter, output, to, bar, trust_remote_code=trust_remote_code)
        console.print(escape(f"{written}: written"), soft_wrap=True)


def _show(report: dict[str, Any], console: Console) -> None:
    table = Table("adapter", "")
    for name in ("path", "form", "base_model", "model_type", "peft_version", "tensors", "dtypes", "size_bytes"):
        value = report[name]
        shown = ", ".join(value) if isinstance(value, list) else value
        table.add_row(name.replace("_", " "), escape(str("?" if shown in (None, "") else shown)))
    console.print(table)
    if report["targets"]:
        targets = Table("target", "matrices", "rank", "scale", "mean |delta|", "largest |delta|")
        for target in report["targets"]:
            ranks, scales = (", ".join(f"{v:g}" for v in target[name]) for name in ("ranks", "scales"))
            norms = ("-" if target[name] is None else f"{target[name]:.4g}" for name in ("mean_norm", "max_norm"))
            targets.add_row(escape(target["name"]), str(target["matrices"]), ranks, scales, *norms)
        console.print(targets)
    for problem in report["problems"]:
        console.print(f"[bold red]problem[/bold red]: {escape(problem)}", soft_wrap=True)
    for note in report["notes"]:
        console.print(f"[cyan]note[/cyan]: {escape(note)}", soft_wrap=True)
