"""Any damage to a container is one FormatError or does no harm: no other exception, no hang, no large allocation."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kt_sft.errors import FormatError
from kt_sft.formats.packed import MANIFEST_NAME, PackedContainer
from tests.helpers.containers import make_container, read_json, write_json

SHORT = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 63, 64, 4096, 2**15, 2**31, 2**32, 2**63, 2**64, 10**400]),
    st.floats(),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = make_container(tmp_path_factory.mktemp("good"), "int4", 32)
    read_everything(folder)  # what is imported or cached once is not counted below
    return folder


def read_everything(folder):
    with PackedContainer(folder) as container:
        for name, layer in container.manifest.layers.items():
            for expert in range(layer.num_experts):
                assert sum(map(len, container.blobs(name, expert))) == sum(blob.size for blob in layer.experts[expert])
        assert container.manifest.errors()
        list(container.check_blobs())


def survives(good, damage):
    """Apply `damage` to a copy and read it all; files here are of 100 KB, so 20 MB are a large allocation."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "packed"
        shutil.copytree(good, folder)
        damage(folder)
        tracemalloc.start()
        try:
            read_everything(folder)
        except FormatError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 20 << 20


def damage_bytes(data):
    """Overwrite, cut or lengthen one of the files."""
    name = data.draw(st.sampled_from([MANIFEST_NAME, "layer-00000.bin", "layer-00001.bin"]))

    def damage(folder):
        path = folder / name
        size = path.stat().st_size
        kind = data.draw(st.sampled_from(["write", "write", "cut", "append"]))
        if kind == "cut":
            os.truncate(path, data.draw(st.integers(0, size - 1)))
            return
        with path.open("r+b") as stream:
            stream.seek(size if kind == "append" else data.draw(st.integers(0, size - 1)))
            stream.write(data.draw(st.binary(min_size=1, max_size=64)))

    return damage


def damage_values(data):
    """Replace, remove or repeat a value anywhere in the manifest, whose checksum is made right again."""

    def damage(folder):
        values = read_json(folder)
        for _ in range(data.draw(st.integers(1, 3))):
            place, key = values, data.draw(st.sampled_from(sorted(values)))
            while isinstance(place[key], (dict, list)) and place[key] and data.draw(st.integers(0, 9)):
                place = place[key]
                key = data.draw(
                    st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1)
                )
            kind = data.draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
            if kind == "replace":
                place[key] = data.draw(VALUES)
            elif kind == "remove":
                del place[key]
            elif isinstance(place, list):
                place.insert(key, json.loads(json.dumps(place[key])))
            if not values:
                break
        write_json(folder, values)

    return damage


@SHORT
@given(data=st.data())
def test_damaged_bytes(good, data):
    survives(good, damage_bytes(data))


@SHORT
@given(data=st.data())
def test_damaged_values(good, data):
    survives(good, damage_values(data))


@pytest.mark.fuzz
@pytest.mark.slow
@pytest.mark.parametrize("kind", [damage_bytes, damage_values])
def test_damage_for_long(good, kind):
    @LONG
    @given(data=st.data())
    def run(data):
        survives(good, kind(data))

    run()
