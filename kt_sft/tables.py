"""Tables of the command line that are more than a few lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Column, Table

from kt_sft.errors import GIB
from kt_sft.placement.plan import groups

if TYPE_CHECKING:
    from kt_sft.placement.budget import DeviceMemory
    from kt_sft.placement.plan import Plan


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
