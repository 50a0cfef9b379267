"""`kt-sft convert`: packed containers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kt_sft.cli.console import errors_in_one_line, path, progress_bar
from kt_sft.errors import GIB

if TYPE_CHECKING:
    from kt_sft.formats.packed_manifest import Manifest

MIB = 1 << 20


def convert(
    input_path: Annotated[Path, typer.Option(parser=path, help="Checkpoint directory, or GGUF file.")],
    output: Annotated[Path, typer.Option(parser=path, help="Directory of the container, new or empty.")],
    quant_method: Annotated[str, typer.Option(help="bf16, int8 or int4 (also moe_int8, moe_int4).")] = "int8",
    input_type: Annotated[str, typer.Option(help="bf16, fp16, fp8, gguf, or auto: what it is.")] = "auto",
    int4_group_size: Annotated[int, typer.Option(help="Weights that share a scale in int4: 32, 64 or 128.")] = 32,
    verify: Annotated[bool, typer.Option("--verify", help="Read all of it back and compare with the source.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a container of other settings.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the code beside config.json run.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Threads; default: the physical cores.")] = None,
) -> None:
    """Pack the experts of a checkpoint once, for `kt_weight_path`: loads in seconds, shared by all processes.

    Interrupted, it goes on where it stopped when it is run again. Exit code 2 on errors.
    """
    console = Console()
    with errors_in_one_line("convert"):
        from kt_sft.config import KTConfig
        from kt_sft.integrations.transformers.converting import convert_checkpoint

        config = KTConfig(method=quant_method, int4_group_size=int4_group_size, threads=threads)
        options = {"input_type": input_type, "overwrite": overwrite, "check": verify}
        options["trust_remote_code"] = trust_remote_code
        result = convert_checkpoint(input_path, output, config, **options, bar=partial(progress_bar, console))
    console.print(_error_table(result.manifest))
    amount = result.manifest.blob_bytes
    size = f"{amount / GIB:.2f} GiB" if amount >= GIB else f"{amount / MIB:.1f} MiB"
    state = "written" if result.is_new else "was complete already"
    checked = ", read back and compared" if verify else ""
    console.print(
        f"{escape(str(output))}: {state}, {size}, {len(result.manifest.layers)} layers{checked}", soft_wrap=True
    )


def _error_table(manifest: Manifest) -> Table:
    """Rounding of each kind of matrix, of the weights relative to the source in bf16."""
    table = Table("matrix", "rel-L2 of the weights", "largest of one expert")
    for projection, (typical, largest) in manifest.errors().items():
        table.add_row(projection, f"{typical:.2%}", f"{largest:.2%}")
    return table
