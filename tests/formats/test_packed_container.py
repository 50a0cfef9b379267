"""The packed container: what is read is what was packed, and nothing else is taken for a container."""

from __future__ import annotations

import copy
import os
import shutil
import zlib

import numpy as np
import pytest

from kt_sft.convert.plan import check_shapes
from kt_sft.convert.run import convert
from kt_sft.convert.slot import ExpertSlot
from kt_sft.convert.verify import verify
from kt_sft.errors import FormatError
from kt_sft.formats.packed import MANIFEST_NAME, PackedContainer, is_container
from kt_sft.formats.packed_manifest import blob_sizes
from kt_sft.models.spec import ExpertsSpec
from kt_sft.native import native
from tests.helpers.containers import FORMATS, SPECS, RandomExperts, make_container, plan_for, read_json, write_json

FIRST, SECOND = SPECS


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_container(tmp_path_factory.mktemp("good"))


@pytest.fixture
def damaged(good, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(good, tmp_path / "packed")


def refused(folder, match):
    with pytest.raises(FormatError, match=match) as caught, PackedContainer(folder) as container:
        list(container.check_blobs())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("weight_format", "group"), FORMATS)
@pytest.mark.parametrize(("hidden", "inter"), [(1, 1), (52, 37), (128, 64), (96, 1408), (2048, 65)])
def test_sizes_are_those_of_the_kernels(weight_format, group, hidden, inter):
    store = native().ExpertStore(1, hidden, inter, weight_format, group_size=group or 32)
    assert store.blob_bytes == blob_sizes(weight_format, group, hidden, inter)


@pytest.mark.parametrize(("weight_format", "group"), FORMATS)
def test_blobs_are_those_of_a_layer_that_packed_the_same_weights(tmp_path, weight_format, group):
    container = PackedContainer(make_container(tmp_path, weight_format, group))
    source = RandomExperts(tmp_path / "source")
    assert list(container.manifest.layers) == list(SPECS)
    for name, spec in SPECS.items():
        for expert in range(spec.num_experts):
            slot = ExpertSlot(spec, weight_format, group)
            slot.load_expert(0, *source.read(name, expert))
            for ours, want in zip(container.blobs(name, expert), slot.export()):
                assert ours.readonly and np.frombuffer(ours, np.uint8).ctypes.data % 64 == 0
                assert bytes(ours) == want.tobytes()
    assert len(list(container.check_blobs())) == 5
    verify(container, source, SPECS)


def test_errors_are_those_of_the_weights(tmp_path):
    container = PackedContainer(make_container(tmp_path, "int4", 32))
    source, name = RandomExperts(tmp_path / "source"), FIRST
    slot = ExpertSlot(SPECS[name], "int4", 32)
    slot.load_packed(0, container.blobs(name, 1), copy=True)
    for held, want, blob in zip(
        slot.unpack_expert(0), source.read(name, 1), container.manifest.layers[name].experts[1]
    ):
        held, want = held.double(), want.double()
        assert blob.error == pytest.approx(((held - want).norm() / want.norm()).item(), rel=1e-5)
        assert 0.05 < blob.error < 0.12


def test_blobs_outlive_the_container(good):
    with PackedContainer(good) as container:
        gate = container.blobs(FIRST, 0)[0]
        crc = container.manifest.layers[FIRST].experts[0][0].crc32
    del container
    assert zlib.crc32(gate) == crc


def test_what_is_no_container(tmp_path, good):
    assert is_container(good) and not is_container(tmp_path) and not is_container(tmp_path / "no")
    refused(tmp_path / "no", "manifest: expected a regular file, found No such file")
    refused(good / MANIFEST_NAME, "manifest: expected a regular file, found Not a directory")


def test_another_model_is_refused(good):
    manifest = PackedContainer(good).manifest
    check_shapes(manifest, SPECS, good)
    for specs, match in (
        (
            {**SPECS, FIRST: ExpertsSpec(3, 52, 38)},
            r"experts of model.layers.1.*expected \(3, 52, 38.*found \(3, 52, 37",
        ),
        ({**SPECS, FIRST: ExpertsSpec(3, 52, 37, "gelu")}, "expected .*'gelu'.*found .*'silu'"),
        ({**SPECS, "model.layers.3.mlp.experts": SPECS[FIRST]}, "layers.3.*expected present"),
        ({FIRST: SPECS[FIRST]}, "layers.2.*one more"),
    ):
        with pytest.raises(FormatError, match=match):
            check_shapes(manifest, specs, good)


def _flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


FILE_DAMAGE = {
    "truncated blobs": (lambda f: os.truncate(f / "layer-00000.bin", 5000), r"00.bin: truncated.*found 5000 bytes"),
    "truncated header": (lambda f: os.truncate(f / "layer-00001.bin", 10), "layer-00001.bin: truncated"),
    "empty blobs": (lambda f: os.truncate(f / "layer-00001.bin", 0), "truncated"),
    "longer": (lambda f: (f / "layer-00000.bin").open("ab").write(b"x"), "longer than the manifest says"),
    "missing": (lambda f: (f / "layer-00000.bin").unlink(), "layer-00000.bin: blob file: .*No such file"),
    "flipped value": (lambda f: _flip(f / "layer-00001.bin", 5000), "gate of expert 0 at byte 4096.*expected CRC-32"),
    "flipped last": (lambda f: _flip(f / "layer-00001.bin", -1), "down of expert 1 at byte .*expected CRC-32"),
    "flipped magic": (lambda f: _flip(f / "layer-00000.bin", 0), "magic at byte 0"),
    "flipped header": (lambda f: _flip(f / "layer-00000.bin", 20), "header: expected that of model.layers.1"),
    "flipped padding": (lambda f: _flip(f / "layer-00000.bin", 4095), "header: expected"),
    "directory": (lambda f: ((f / "layer-00000.bin").unlink(), (f / "layer-00000.bin").mkdir()), "a regular file"),
    "pipe": (lambda f: ((f / "layer-00000.bin").unlink(), os.mkfifo(f / "layer-00000.bin")), "a regular file"),
    "loop": (
        lambda f: ((f / "layer-00000.bin").unlink(), (f / "layer-00000.bin").symlink_to("layer-00000.bin")),
        "Too many levels of symbolic links",
    ),
    "manifest loop": (
        lambda f: ((f / MANIFEST_NAME).unlink(), (f / MANIFEST_NAME).symlink_to(MANIFEST_NAME)),
        "manifest: .*Too many levels",
    ),
    "manifest empty": (lambda f: os.truncate(f / MANIFEST_NAME, 0), "manifest: expected JSON"),
    "manifest truncated": (lambda f: os.truncate(f / MANIFEST_NAME, 300), "manifest: expected JSON"),
    "manifest of zeros": (lambda f: (f / MANIFEST_NAME).write_bytes(bytes(500)), "manifest: expected JSON"),
    "manifest deep": (lambda f: (f / MANIFEST_NAME).write_text("[" * 100_000), "manifest: expected JSON"),
    "manifest twice": (lambda f: (f / MANIFEST_NAME).write_text('{"format": "a", "format": "b"}'), "twice"),
    "manifest huge": (lambda f: os.truncate(f / MANIFEST_NAME, 1 << 40), "at most 268435456 bytes, found 1099511"),
    "unfinished": (
        lambda f: (f / MANIFEST_NAME).rename(f / "convert-journal.jsonl"),
        "expected a finished conversion, found an unfinished one; run the same",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILE_DAMAGE)
def test_damaged_files_are_refused(damaged, kind):
    damage, match = FILE_DAMAGE[kind]
    damage(damaged)
    refused(damaged, match)


def test_swapped_files_are_refused(tmp_path):
    """Of the right length, so that only the header can tell."""
    spec = ExpertsSpec(2, 40, 24)
    source = RandomExperts(tmp_path / "source", {"a.experts": spec, "b.experts": spec})
    convert(source, plan_for(source, tmp_path / "one"))
    (tmp_path / "one" / "layer-00000.bin").write_bytes((tmp_path / "one" / "layer-00001.bin").read_bytes())
    refused(tmp_path / "one", "layer-00000.bin: header: expected that of a.experts in this container")
    other = RandomExperts(tmp_path / "other", source.specs, seed=1)
    convert(other, plan_for(other, tmp_path / "two"))
    (tmp_path / "one" / "layer-00000.bin").write_bytes((tmp_path / "two" / "layer-00000.bin").read_bytes())
    refused(tmp_path / "one", "layer-00000.bin: header: expected that of a.experts in this container")


def test_a_changed_manifest_is_refused_by_its_checksum(damaged):
    values = read_json(damaged)
    values["layers"][0]["experts"][1][2][3] = 0.5
    write_json(damaged, values, checksum=False)
    refused(damaged, "checksum: expected that of the manifest's content")


def _set(*path):
    """Damage that sets values[path[0]]...[path[-2]] = path[-1]."""

    def damage(values):
        *way, last, value = path
        for key in way:
            values = values[key]
        values[last] = value

    return damage


HUGE = 10**30
FIELD_DAMAGE = {
    "format": (_set("format", "gguf"), "format: expected kt_sft packed experts, found gguf"),
    "version": (_set("version", 2), "version: expected 1, found 2; use a newer"),
    "version is true": (_set("version", True), "version: expected a whole number"),
    "layout": (_set("layout", "rows/7"), "layout: expected tiles16-panels32/1, found rows/7"),
    "no weights": (_set("weights", None), "weights: expected an object"),
    "weight format": (_set("weights", "format", "int3"), "weights.format: expected one of bf16, int8, int4"),
    "group": (_set("weights", "group", 32), "weights.group: expected"),
    "no layers": (_set("layers", []), "layers: expected at least one"),
    "layers no list": (_set("layers", 7), "layers: expected a list"),
    "layer no object": (_set("layers", 0, 7), r"layers\[0\].name: expected text"),
    "twice a name": (_set("layers", 1, "name", FIRST), r"layers\[1\]: expected a layer and a file of its own"),
    "twice a file": (_set("layers", 1, "file", "layer-00000.bin"), r"layers\[1\]: expected a layer and a file"),
    "parent folder": (_set("layers", 0, "file", "../layer-00000.bin"), "a name such as layer-00000.bin"),
    "absolute": (_set("layers", 0, "file", "/etc/passwd"), "a name such as layer-00000.bin"),
    "newline": (_set("layers", 0, "file", "layer-00000.bin\n"), "a name such as layer-00000.bin"),
    "surrogate": (_set("layers", 0, "name", "\ud800"), "header: expected that of"),
    "huge experts": (_set("layers", 0, "num_experts", HUGE), "num_experts: expected 1 to 32768"),
    "no experts": (_set("layers", 0, "num_experts", 0), "num_experts: expected 1 to 32768"),
    "huge hidden": (_set("layers", 0, "hidden", 1 << 40), "hidden: expected 1 to 32768"),
    "other hidden": (_set("layers", 0, "hidden", 64 + 52), r"experts\[0\] gate: expected .* bytes at 4096"),
    "float size": (_set("layers", 0, "inter", 37.0), "inter: expected a whole number"),
    "an expert too many": (lambda v: v["layers"][0]["experts"].append([]), "expected 3 entries, found 4"),
    "an expert too few": (lambda v: v["layers"][0]["experts"].pop(), "experts: expected 3 entries, found 2"),
    "a blob too few": (lambda v: v["layers"][0]["experts"][1].pop(), r"experts\[1\]: expected gate, up and down"),
    "same expert twice": (
        lambda v: v["layers"][0]["experts"].__setitem__(1, copy.deepcopy(v["layers"][0]["experts"][0])),
        r"experts\[1\] gate: expected .* bytes at .*, found .* bytes at 4096",
    ),
    "offset out of range": (_set("layers", 0, "experts", 2, 0, 0, 1 << 50), r"experts\[2\] gate"),
    "negative offset": (_set("layers", 0, "experts", 0, 0, 0, -64), r"experts\[0\] gate: .*found .* bytes at -64"),
    "huge blob": (_set("layers", 0, "experts", 0, 0, 1, 1 << 62), r"experts\[0\] gate"),
    "text blob": (_set("layers", 0, "experts", 0, 0, "x"), r"experts\[0\] gate: expected \[offset, size"),
    "error is nan": (_set("layers", 0, "experts", 0, 0, 3, float("nan")), r"gate: expected \[offset, size"),
    "file bytes": (_set("layers", 0, "file_bytes", 1 << 60), "file_bytes: expected"),
    "source rows": (_set("source", "files", [["a", "b", "c"]]), "source.files: expected"),
    "source formats": (_set("source", "formats", [1]), "source.formats: expected names"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FIELD_DAMAGE)
def test_a_manifest_at_odds_with_itself_is_refused(damaged, kind):
    damage, match = FIELD_DAMAGE[kind]
    values = read_json(damaged)
    damage(values)
    write_json(damaged, values)
    refused(damaged, match)


def test_a_file_replaced_after_opening_is_refused(damaged):
    container = PackedContainer(damaged)
    os.truncate(damaged / "layer-00000.bin", 4096)
    with pytest.raises(FormatError, match="truncated"):
        container.blobs(FIRST, 0)
