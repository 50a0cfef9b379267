"""Random experts as a source for conversions, and small containers made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kt_sft.convert.plan import ConvertPlan, plan_conversion
from kt_sft.convert.run import convert
from kt_sft.formats.packed import MANIFEST_NAME, PackedContainer
from kt_sft.models.spec import ExpertsSpec
from kt_sft.nn.routed_experts import Matrices

# Sides differ, are no multiples of tiles, and are not the same in both layers.
SPECS = {"model.layers.1.mlp.experts": ExpertsSpec(3, 52, 37), "model.layers.2.mlp.experts": ExpertsSpec(2, 52, 70)}
FORMATS = [("bf16", 0), ("int8", 0), ("int4", 32), ("int4", 128)]


class RandomExperts:
    """A source whose weights follow from a seed, beside a file that stands for the checkpoint."""

    def __init__(self, folder: Path, specs: Mapping[str, ExpertsSpec] = SPECS, seed: int = 0):
        self.path = folder
        self.specs = dict(specs)
        self.seed = seed
        self.formats = {name: ("BF16",) * 3 for name in specs}
        self.reads: list[tuple[str, int]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / "model.safetensors"]
        self.files[0].write_bytes(f"checkpoint {seed}".encode())

    def read(self, name: str, expert: int) -> Matrices:
        self.reads.append((name, expert))
        spec = self.specs[name]
        g = torch.Generator().manual_seed(self.seed + 1000 * expert + len(name) + spec.inter)
        into, out = (spec.inter, spec.hidden), (spec.hidden, spec.inter)
        gate, up, down = (torch.randn(shape, generator=g).to(torch.bfloat16) for shape in (into, into, out))
        return gate, up, down

    def tensor_names(self, name: str, expert: int) -> tuple[str, str, str]:
        gate, up, down = (f"{name}.{expert}.{side}_proj.weight" for side in ("gate", "up", "down"))
        return gate, up, down

    def close(self) -> None:
        pass


def plan_for(source: RandomExperts, output: Path, weight_format: str = "int8", group: int = 0) -> ConvertPlan:
    return plan_conversion(source, source.specs, output, weight_format, group, "tiny_moe")


def make_container(folder: Path, weight_format: str = "int8", group: int = 0) -> Path:
    """A container below `folder`, of a source beside it."""
    source = RandomExperts(folder / "source")
    convert(source, plan_for(source, folder / "packed", weight_format, group))
    return folder / "packed"


def read_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST_NAME).read_text())


def write_json(folder: Path, values: dict[str, Any], *, checksum: bool = True) -> None:
    """Write a manifest, with the checksum that belongs to it: the checks behind that one are to be met."""
    if checksum:
        body = {key: value for key, value in values.items() if key != "checksum"}
        values = {**body, "checksum": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}
    (folder / MANIFEST_NAME).write_text(json.dumps(values))


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything but the lock file."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "convert.lock"}


def blobs_of(folder: Path) -> dict[tuple[str, int], list[bytes]]:
    """What a container holds, by layer and expert, whatever its files are called."""
    with PackedContainer(folder) as container:
        layers = container.manifest.layers.values()
        places = [(layer.name, expert) for layer in layers for expert in range(layer.num_experts)]
        return {place: [bytes(blob) for blob in container.blobs(*place)] for place in places}
