"""Any damage to a checkpoint is one FormatError or does no harm: no other exception, no hang, no large allocation."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kt_sft.errors import FormatError, UnsupportedModel
from kt_sft.formats.gguf import GgufIndex
from kt_sft.formats.quantized_index import QuantizedIndex, read_quantization
from kt_sft.formats.safetensors_index import INDEX_NAME, SafetensorsIndex
from tests.helpers import gguf_files

SHORT = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2**15, 2**31, 2**32, 2**63, 2**64, 10**400]),
    st.floats(),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)
# Fields of GGUF headers that lead far when they lie.
FIELDS = st.one_of(
    st.sampled_from([0, 1, 9, 13, 255, 2**16, 2**24, 2**31, 2**32 - 1]).map(lambda n: struct.pack("<I", n)),
    st.sampled_from([0, 1, 2**20, 2**22, 2**31, 2**40, 2**63, 2**64 - 1]).map(lambda n: struct.pack("<Q", n)),
    st.binary(min_size=1, max_size=16),
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One directory of each kind, and the function that reads all of it."""
    root = tmp_path_factory.mktemp("good")
    for kind in ("gguf", "safetensors"):
        (root / kind).mkdir()
    metadata = {"general.architecture": "x", "a.list": [1, 2], "a.names": ["x", "y"], "a.deep": [[1], [2]], "a.b": True}
    tensors = {
        "one": gguf_files.random_blocks("F32", (5, 3)),
        "two": gguf_files.random_blocks("Q4_K", (3, 7, 512)),
        "three": gguf_files.random_blocks("IQ1_S", (2, 256)),
    }
    gguf_files.write_split(root / "gguf", "m", metadata, tensors, 2)
    w = torch.randn(20, 40).to(torch.float8_e4m3fn)
    parts = {
        "a.safetensors": {"x.weight": w, "x.weight_scale_inv": torch.ones(2, 2), "n": torch.ones(7)},
        "b.safetensors": {"y.weight": torch.ones(3, 5, dtype=torch.bfloat16)},
    }
    weight_map = {}
    for file, part in parts.items():
        save_file(part, root / "safetensors" / file)
        weight_map |= dict.fromkeys(part, file)
    (root / "safetensors" / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    (root / "safetensors" / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    for kind in READERS:  # what is imported or cached once is not counted below
        READERS[kind](root / kind)
    return root


def read_gguf(folder: Path) -> None:
    with GgufIndex.from_path(folder) as index:
        for name in index:
            info = index.info(name)
            assert index.blocks(name).numel() == info.num_bytes
            index.blocks(name).sum()


def read_safetensors(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())  # damaged JSON is the business of model_files
    quantization = read_quantization(values["quantization_config"], folder)
    with QuantizedIndex(SafetensorsIndex.from_directory(folder), quantization) as index:
        for name in index:
            assert index.read(name).shape == index.info(name).shape


READERS = {"gguf": read_gguf, "safetensors": read_safetensors}


def survives(good: Path, kind: str, damage) -> None:
    """Apply `damage` to a copy and read it all; files here are of some KB, so 20 MB are a large allocation."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / kind
        shutil.copytree(good / kind, folder)
        damage(folder)
        tracemalloc.start()
        try:
            READERS[kind](folder)
        except (FormatError, UnsupportedModel) as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 20 << 20


def damage_bytes(data, kind: str):
    """Overwrite, cut or lengthen a file, mostly near its beginning."""

    def damage(folder: Path) -> None:
        path = data.draw(st.sampled_from(sorted(p for p in folder.iterdir() if p.name != "config.json")))
        size = path.stat().st_size
        how = data.draw(st.sampled_from(["write", "write", "write", "cut", "append"]))
        if how == "cut":
            os.truncate(path, data.draw(st.integers(0, size - 1)))
            return
        at = data.draw(st.one_of(st.integers(0, min(size - 1, 600)), st.integers(0, size - 1)))
        with path.open("r+b") as stream:
            stream.seek(size if how == "append" else at)
            stream.write(data.draw(FIELDS))

    return damage


def damage_values(data, kind: str):
    """Replace or remove a value in a JSON header, the index or config.json."""

    def damage(folder: Path) -> None:
        path = data.draw(st.sampled_from(sorted(folder.iterdir())))
        raw = path.read_bytes()
        is_weights = path.suffix == ".safetensors"
        length = struct.unpack("<Q", raw[:8])[0] if is_weights else 0
        values = json.loads(raw[8 : 8 + length] if is_weights else raw)
        for _ in range(data.draw(st.integers(1, 3))):
            place, key = values, data.draw(st.sampled_from(sorted(values)))
            while isinstance(place[key], (dict, list)) and place[key] and data.draw(st.integers(0, 4)):
                place = place[key]
                keys = sorted(place) if isinstance(place, dict) else range(len(place))
                key = data.draw(st.sampled_from(keys))
            place[key] = data.draw(VALUES)
        values.setdefault("quantization_config", None) if path.name == "config.json" else None
        text = json.dumps(values).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :] if is_weights else text)

    return damage


KINDS = [("gguf", damage_bytes), ("safetensors", damage_bytes), ("safetensors", damage_values)]
IDS = ["gguf bytes", "safetensors bytes", "safetensors values"]


def run(good: Path, kind: str, damage, effort) -> None:
    @effort
    @given(data=st.data())
    def attempt(data):
        survives(good, kind, damage(data, kind))

    attempt()


@pytest.mark.parametrize(("kind", "damage"), KINDS, ids=IDS)
def test_damage(good, kind, damage):
    run(good, kind, damage, SHORT)


@pytest.mark.fuzz
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "damage"), KINDS, ids=IDS)
def test_damage_for_long(good, kind, damage):
    run(good, kind, damage, LONG)
