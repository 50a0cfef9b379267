"""The demo model's experts in every stored form: what it takes, what it rounds, and whether the model still learns.

    python scripts/demo/formats.py [--no-train]

Converts the demo model to packed int8 and int4 containers, and writes its experts as GGUF files in Q8_0 and Q5_0; the
latter is what llama.cpp takes for Q4_K where rows are no multiple of 256. Then trains and asks with each (run_demo.py).
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from build_moe import build
from rich.console import Console
from rich.table import Table
from run_demo import ROOT, Run

from kt_sft.formats.packed import PackedContainer
from kt_sft.formats.safetensors_index import SafetensorsIndex
from kt_sft.formats.staging import new_path

PROJECTIONS = {"w1": "gate", "w3": "up", "w2": "down"}  # of Mixtral
KEY = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")


@dataclass
class Form:
    """One stored form of the experts."""

    name: str
    method: str
    path: Path
    seconds: float
    num_bytes: int
    error: float  # rel-L2 of the worst projection (containers) or tensor (GGUF)


def size_of(path: Path) -> int:
    """Bytes of a file or of all files of a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


def convert(model: Path, method: str) -> Form:
    """A packed container, by the command that users take."""
    target = model.with_name(f"{model.name}-{method}")
    words = ["convert", "--input-path", model, "--output", target, "--quant-method", method, "--overwrite"]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kt_sft.cli", *map(str, words)], cwd=ROOT, check=True)
    seconds = time.perf_counter() - start
    errors = PackedContainer(ROOT / target).manifest.errors()
    worst = max(mean for mean, _ in errors.values())
    return Form(f"container {method}", method, target, seconds, size_of(ROOT / target), worst)


def write_gguf(model: Path, kind: str) -> Form:
    """The experts alone, one tensor of all experts per layer and projection."""
    import gguf

    target = model.with_name(f"{model.name}-{kind.lower()}.gguf")
    start = time.perf_counter()
    worst = 0.0
    (ROOT / target).unlink(missing_ok=True)
    with new_path(ROOT / target, is_file=True) as staged:
        writer = gguf.GGUFWriter(staged, "llama")
        type_ = gguf.GGMLQuantizationType[kind]
        with SafetensorsIndex.from_directory(ROOT / model) as file:
            experts: dict[tuple[int, str], dict[int, str]] = {}
            for key in file:
                if found := KEY.fullmatch(key):
                    experts.setdefault((int(found[1]), found[3]), {})[int(found[2])] = key
            for (layer, name), keys in sorted(experts.items()):
                values = np.stack([file.read(keys[index]).float().numpy() for index in sorted(keys)])
                blocks = gguf.quantize(values, type_)
                back = gguf.dequantize(blocks, type_)
                worst = max(worst, float(np.linalg.norm(back - values) / np.linalg.norm(values)))
                writer.add_tensor(f"blk.{layer}.ffn_{PROJECTIONS[name]}_exps.weight", blocks, raw_dtype=type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Form(f"GGUF {kind}", "gguf", target, time.perf_counter() - start, size_of(ROOT / target), worst)


def main(train: Annotated[bool, typer.Option(help="Train and ask with each form.")] = True) -> None:
    """Convert the demo model to every form and show sizes, times, errors and what was learned."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    model = Run.from_yaml("mixtral").model
    build(ROOT / model)
    forms = [convert(model, "int8"), convert(model, "int4"), write_gguf(model, "Q8_0"), write_gguf(model, "Q5_0")]
    table = Table("form", "MiB", "seconds", "worst rel-L2", "training and questions")
    for form in forms:
        result = "-"
        if train:
            words = ["--method", form.method, "--weights", str(form.path)]
            done = subprocess.run([sys.executable, ROOT / "scripts/demo/run_demo.py", *words], capture_output=True)
            lines = done.stdout.decode(errors="replace").splitlines()
            result = next((line for line in lines if line.startswith("learned")), f"exit status {done.returncode}")
        table.add_row(form.name, f"{form.num_bytes / 2**20:.0f}", f"{form.seconds:.1f}", f"{form.error:.2%}", result)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
