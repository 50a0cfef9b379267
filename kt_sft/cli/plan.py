"""`kt-sft plan`: what a run puts where, and the memory of each device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from kt_sft.cli.console import errors_in_one_line, path
from kt_sft.errors import GIB
from kt_sft.placement.plan import groups

if TYPE_CHECKING:
    from kt_sft.placement.budget import DeviceMemory
    from kt_sft.placement.plan import Plan


def plan(
    run: Annotated[Path, typer.Argument(parser=path, help="Configuration of LLaMA-Factory, YAML or JSON.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as llamafactory-cli takes them.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Of modules without a rule; default: cuda:0, or cpu with use_cpu.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show what goes where, and the memory of each device, without weights or a GPU. Exit code 2 on errors."""
    with errors_in_one_line("plan"):
        from kt_sft.integrations.llamafactory.planning import plan_run

        result = plan_run(run, overrides or (), device=device)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
        return
    console = Console()
    console.print(placement_table(result.plan))
    console.print(memory_table(result.memory, result.run.trains))
    use = "training, estimated" if result.run.trains else "inference, estimated"
    console.print(f"{escape(result.model)}: {use} for passes of {result.run.tokens} tokens", soft_wrap=True)


def placement_table(plan: Plan) -> Table:
    """What goes where, and by which rule."""
    table = Table(Column("modules", overflow="fold"), "what", "device", "rule")
    for group in groups(plan):
        rules = ", ".join(map(str, group.rules)) or "-"
        table.add_row(escape(group.modules), group.what, group.device, rules)
    return table


def memory_table(memory: dict[str, DeviceMemory], trains: bool) -> Table:
    """GiB of each device, by component."""
    right = {"justify": "right", "no_wrap": True}
    lora = "LoRA, Adam" if trains else "LoRA"
    heads = ("weights", "experts", "staging", lora, "activations", "total GiB")
    table = Table(Column("device", no_wrap=True), *(Column(head, **right) for head in heads))
    for device, held in memory.items():
        parts = (held.weights_bytes, held.experts_bytes, held.staging_bytes, held.lora_bytes, held.activations_bytes)
        total = f"[bold]{held.total_bytes / GIB:.2f}[/bold]"
        table.add_row(device, *(f"{part / GIB:.2f}" for part in parts), total)
    return table
