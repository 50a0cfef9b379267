"""`kt-sft doctor`: what this machine offers, as tables."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from kt_sft.cli import kernel_choice
from kt_sft.cli.console import errors_in_one_line

if TYPE_CHECKING:
    from kt_sft.doctor import Report

FORMAT_ORDER = {
    name: i for i, name in enumerate(("bf16", "int8", "int4", "f16", "block8", "block6", "block5", "block4"))
}
PRODUCTS = {"forward": "forward", "input_grad": "gradient"}
MARKS = {True: "[green]ok[/green]", False: "[red]no[/red]", None: "[dim]-[/dim]"}
LEVELS = {"error": "[bold red]error[/bold red]", "warning": "[yellow]warning[/yellow]", "note": "[cyan]note[/cyan]"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every kernel, not only those in use.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Say instead which kernel each product takes, and why not another.")
    ] = False,
    formats: Annotated[
        str | None, typer.Option(help="With --kernels: weight formats, as in int8,q4_k. Default: one of each kind.")
    ] = None,
    m: Annotated[str, typer.Option(help="With --kernels: numbers of rows that meet in a product.")] = "1,4,16,64,512",
    n: Annotated[int, typer.Option(help="With --kernels: outputs of the weights.")] = 1408,
    k: Annotated[int, typer.Option(help="With --kernels: inputs of the weights.")] = 2048,
) -> None:
    """Say what this machine offers, which kernels will run, what to do about each problem; exit code 1 on errors."""
    if kernels:
        with errors_in_one_line("doctor"):
            kernel_choice.show(formats, m, n=n, k=k, as_json=as_json)
        return
    with errors_in_one_line("doctor"):
        from kt_sft.doctor import collect

        report = collect()
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _show(report, Console(), verbose)
    raise typer.Exit(0 if report.ok else 1)


def _show(report: Report, console: Console, verbose: bool) -> None:
    console.print(_machine_table(report))
    console.print(_kernel_table(report))
    if verbose:
        console.print(_every_kernel_table(report))
    console.print(_version_table(report))
    hook = (
        "[green]active[/green]"
        if report.hook.get("active")
        else f"not active: {escape(str(report.hook.get('reason')))}"
    )
    console.print(f"LLaMA-Factory hook: {hook}")
    for name, value in report.environment.items():
        console.print(f"environment: {name}={escape(value)}")
    console.print()
    for finding in report.findings:
        console.print(f"{LEVELS[finding.level]}: {escape(finding.what)}", soft_wrap=True)
        console.print(f"    remedy: {escape(finding.remedy)}", soft_wrap=True)
    verdict = "[green]ready to train[/green]" if report.ok else "[bold red]not ready: see the errors above[/bold red]"
    console.print(f"\nkt-sft doctor: {verdict}")


def _machine_table(report: Report) -> Table:
    machine, table = report.machine, Table("machine", "")
    nodes = machine.get("numa_nodes")
    quota = machine.get("quota_cpus")
    cores = f"{machine.get('physical_cores') or '?'} physical, {machine.get('logical_cpus') or '?'} logical"
    table.add_row("CPU", escape(str(machine.get("model_name", "?"))))
    table.add_row("cores", cores + (f", limited to {quota:g} by the container" if quota else ""))
    table.add_row("kernel threads", str(report.kernels.get("threads") or "?"))
    table.add_row(
        "NUMA nodes", "?" if nodes is None else f"{len(nodes)} (CPUs each: {', '.join(str(len(n)) for n in nodes)})"
    )
    if memory := machine.get("memory"):
        amounts = f"{memory['available_gib']} GiB available of {memory['total_gib']} GiB"
        table.add_row("memory", f"{amounts} (limit: {memory['limited_by']})")
    gpus = "; ".join(f"{gpu['name']}, {gpu['memory_gib']} GiB" for gpu in report.gpus)
    table.add_row("GPUs", escape(gpus) or "none")
    return table


def _kernel_table(report: Report) -> Table:
    """The kernels in use, one line per weight format and kind of product."""
    kernels = report.kernels
    detected = ", ".join(kernels.get("detected") or []) or "none"
    table = Table("weights", "activations", "product", Column("kernels in use", overflow="fold"))
    table.title = f"instruction sets: {detected}; in use: {kernels.get('active') or 'none'}; AMX: {kernels.get('amx')}"
    table.title_justify = "left"
    used: dict[tuple[str, str, str], list[str]] = {}
    for row in kernels.get("rows") or []:
        names = used.setdefault((row["format"], row["rows"], row["op"]), [])
        if row["selected"]:
            names.append(row["name"])
    inference = kernels.get("inference_activations") or {}
    gguf_types = kernels.get("gguf_types") or {}
    for (weights, activations, op), names in sorted(used.items(), key=lambda item: FORMAT_ORDER[item[0][0]]):
        default = activations == inference.get(weights) and op == "forward" and weights != "bf16"
        label = f"{weights} ({', '.join(gguf_types[weights])})" if weights in gguf_types else weights
        table.add_row(label, activations + (" (inference)" if default else ""), PRODUCTS[op], ", ".join(names) or "-")
    return table


def _every_kernel_table(report: Report) -> Table:
    table = Table(Column("kernel", no_wrap=True), "weights", "activations", "ISA", "CPU has it", "in use")
    for row in report.kernels.get("rows") or []:
        marks = MARKS[bool(row["available"])], "[bold green]yes[/bold green]" if row["selected"] else ""
        table.add_row(row["name"], row["format"], row["rows"], row["isa"], *marks)
    return table


def _version_table(report: Report) -> Table:
    table = Table("package", "installed", "supported", "")
    for row in report.versions:
        table.add_row(
            row["name"], row["installed"] or "not installed", escape(row["supported"] or ""), MARKS[row["ok"]]
        )
    return table
