"""`kt-sft doctor --kernels`: which kernel each product takes, what others would cost and why the rest is out."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from kt_sft.errors import ConfigError

if TYPE_CHECKING:
    from kt_sft.doctor import KernelChoice

WIDTH = 80
OPS = {"forward": "forward", "input_grad": "input gradient"}
RUNNERS_UP = 2  # shown for each number of rows


def show(formats: str | None, m: str, *, n: int, k: int, as_json: bool) -> None:
    """Print the choices for lists of formats and of numbers of rows, separated by commas.

    Raises:
        ConfigError: as `kt_sft.doctor.kernel_choices`.
    """
    from kt_sft.doctor import kernel_choices
    from kt_sft.native import native

    names = None if formats is None else [name.strip() for name in formats.split(",")]
    choices = kernel_choices(names, _numbers(m), n=n, k=k)
    active = native().isa_active()
    if as_json:
        typer.echo(
            json.dumps({"isa": active, "n": n, "k": k, "choices": [asdict(choice) for choice in choices]}, indent=2)
        )
        return
    head = (
        f"Kernels up to {active} for m rows and weights [n = {n}, k = {k}]. Of the rows of the table that can make a "
    )
    head += "product the one of least estimated cycles is taken: of one core whose operands are in its caches."
    typer.echo(textwrap.fill(head, WIDTH))
    for choice in choices:
        typer.echo("\n" + "\n".join(_lines(choice, active)))


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if bad := [part for part in parts if not part.isdecimal()]:
        raise ConfigError(f"m: expected whole numbers separated by commas, found {bad[0]!r}")
    return sorted({int(part) for part in parts})


def _lines(choice: KernelChoice, active: str) -> list[str]:
    lines = [
        f"{choice.weights} weights, {choice.rows} rows, {OPS[choice.op]}",
        f"{'m':>9}  {'kernel':<36}  {'kcycles':>10}",
    ]
    for m in choice.verdicts:
        if (chosen := choice.chosen(m)) is None:
            lines.append(f"{m:>9}  none")
            continue
        lines.append(f"{m:>9}  {chosen['name']:<36}  {chosen['cycles'] / 1000:>10.1f}  chosen")
        for row in choice.runners_up(m)[:RUNNERS_UP]:
            times = f"{row['cycles'] / chosen['cycles']:.2f} times"
            lines.append(f"{'':>9}  {row['name']:<36}  {row['cycles'] / 1000:>10.1f}  {times}")
    out: dict[str, dict[str, None]] = {}
    for verdicts in choice.verdicts.values():
        for row in verdicts:
            if row["refusal"]:
                out.setdefault(_reason(row, active), {})[row["name"]] = None
    for reason, names in out.items():
        text = f"out, {reason}: {', '.join(names)}"
        lines += textwrap.wrap(text, WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)
    return lines


def _reason(row: dict[str, Any], active: str) -> str:
    return {
        "cpu": f"this CPU lacks {row['isa']}",
        "narrowed": f"above the level {active}",
        "rows": f"takes {row['rows']} rows",
        "max_m": f"for more than {row['max_m']} rows",
        "row_length": "int8 rows are too long",
    }[row["refusal"]]
