"""The command `kt-sft`; each subcommand shows what another module found out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from kt_sft import cli_adapter, cli_plan
from kt_sft.errors import GIB
from kt_sft.serving import cli as serving

if TYPE_CHECKING:
    from kt_sft.doctor import Report
    from kt_sft.formats.packed_manifest import Manifest

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(serving.serve)
app.add_typer(serving.bench_app, name="bench")
app.add_typer(cli_adapter.app, name="adapter")
app.command()(cli_adapter.merge)
app.command()(cli_plan.plan)
MIB = 1 << 20
FORMAT_ORDER = {
    name: i for i, name in enumerate(("bf16", "int8", "int4", "f16", "block8", "block6", "block5", "block4"))
}
PRODUCTS = {"forward": "forward", "input_grad": "gradient"}
MARKS = {True: "[green]ok[/green]", False: "[red]no[/red]", None: "[dim]-[/dim]"}
LEVELS = {"error": "[bold red]error[/bold red]", "warning": "[yellow]warning[/yellow]", "note": "[cyan]note[/cyan]"}


@app.callback()
def main() -> None:
    """Fine-tuning of mixture-of-experts models with the routed experts in CPU kernels."""


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every kernel, not only those in use.")] = False,
) -> None:
    """Say what this machine offers, which kernels will run, what to do about each problem; exit code 1 on errors."""
    from kt_sft.doctor import collect

    report = collect()
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _show(report, Console(), verbose)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def convert(
    input_path: Annotated[Path, typer.Option(help="Checkpoint directory, or GGUF file.")],
    output: Annotated[Path, typer.Option(help="Directory of the container, new or empty.")],
    quant_method: Annotated[str, typer.Option(help="bf16, int8 or int4 (also moe_int8, moe_int4).")] = "int8",
    input_type: Annotated[str, typer.Option(help="bf16, fp16, fp8, gguf, or auto: what it is.")] = "auto",
    int4_group_size: Annotated[int, typer.Option(help="Weights that share a scale in int4: 32, 64 or 128.")] = 32,
    verify: Annotated[bool, typer.Option("--verify", help="Read all of it back and compare with the source.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a container of other settings.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads; default: the physical cores.")] = None,
) -> None:
    """Pack the experts of a checkpoint once, for `kt_weight_path`: loads in seconds, shared by all processes.

    Interrupted, it goes on where it stopped when it is run again. Exit code 2 on errors.
    """
    from kt_sft import env
    from kt_sft.config import KTConfig
    from kt_sft.errors import KTError
    from kt_sft.integrations.converting import convert_checkpoint

    console = Console()
    try:
        config = KTConfig(method=quant_method, int4_group_size=int4_group_size, threads=threads)
        options = {"input_type": input_type, "overwrite": overwrite, "check": verify}
        result = convert_checkpoint(input_path, output, config, **options, bar=partial(progress_bar, console))
    except KTError as error:
        if env.traceback():
            raise
        Console(stderr=True).print(f"kt-sft convert: error: {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None
    console.print(_error_table(result.manifest))
    amount = result.manifest.blob_bytes
    size = f"{amount / GIB:.2f} GiB" if amount >= GIB else f"{amount / MIB:.1f} MiB"
    state = "written" if result.is_new else "was complete already"
    checked = ", read back and compared" if verify else ""
    console.print(
        f"{escape(str(output))}: {state}, {size}, {len(result.manifest.layers)} layers{checked}", soft_wrap=True
    )


@contextmanager
def progress_bar(console: Console, what: str, total: int) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar over experts or tensors; gives the function that moves it."""
    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        "left",
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)

        def move(done: int, _total: int, layer: str) -> None:
            progress.update(task, completed=done, description=f"{what} {escape(layer)}")

        yield move


def _error_table(manifest: Manifest) -> Table:
    """Rounding of each kind of matrix, of the weights relative to the source in bf16."""
    table = Table("matrix", "rel-L2 of the weights", "largest of one expert")
    for projection, (typical, largest) in manifest.errors().items():
        table.add_row(projection, f"{typical:.2%}", f"{largest:.2%}")
    return table


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


if __name__ == "__main__":
    app()
