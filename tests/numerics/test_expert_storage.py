"""Packed experts from outside: mapped or copied they compute, bit for bit, what packed ones compute."""

from __future__ import annotations

import dataclasses
import gc

import numpy as np
import pytest
import torch

from kt_sft.native import native
from tests.helpers.layers import LayerCase, empty_layer, make_layer, make_problem, run, using_threads, with_format
from tests.numerics.test_block_types import load as load_blocks

# Shards of unequal width, the last of which ends inside a tile; int4 groups of 128 have three units along inter.
CASE = LayerCase(experts=3, hidden=150, inter=300, tokens=11, top_k=2, rank=3, seed=50)
BLOCKS = [("q4_k", "q5_k", "q6_k"), ("iq4_xs", "bf16", "q5_0"), ("mxfp4", "int8", "f16"), ("q8_0", "q4_0", "mxfp4")]


def aligned_bytes(count: int, offset: int = 0) -> np.ndarray:
    """Random bytes, so that what is not written shows, `offset` bytes after a multiple of 64."""
    memory = np.random.default_rng(0).integers(0, 256, count + 128, dtype=np.uint8)
    start = -memory.ctypes.data % 64 + offset
    return memory[start : start + count]


def blobs_of(layer) -> list[list[np.ndarray]]:
    """(gate, up, down) of every expert as the layer's store exports them."""
    store = layer.store
    blobs = [[aligned_bytes(size) for size in store.blob_bytes] for _ in range(store.num_experts)]
    for expert, parts in enumerate(blobs):
        store.export_expert(expert, *parts)
    return blobs


def assert_same(a: dict, b: dict) -> None:
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def problem(weights):
    return make_problem(with_format(CASE, weights))


def fill(store, blobs, method: str) -> None:
    """Hand over every expert by `map_expert` or `copy_expert`."""
    for expert, parts in enumerate(blobs):
        getattr(store, method)(expert, *(memoryview(part).toreadonly() for part in parts))


@pytest.mark.parametrize("pools", [1, 2, 3, 5])
def test_mapped_and_copied_equal_packed_with_any_number_of_shards(problem, pools):
    blobs = blobs_of(make_layer(problem))
    with using_threads(pools + 1, pools):
        packed, mapped, copied = make_layer(problem), empty_layer(problem), empty_layer(problem)
        fill(copied.store, blobs, "copy_expert")
        fill(mapped.store, blobs_of(copied), "map_expert")
        gc.collect()  # the store alone keeps the memory now
        units = -(-CASE.inter // (128 if problem.group == 128 else 64))
        assert packed.store.num_shards == mapped.store.num_shards == copied.store.num_shards == min(pools, units)
        assert [layer.store.mapped_experts for layer in (mapped, copied, packed)] == [CASE.experts, 0, 0]
        assert mapped.store.missing_experts == copied.store.missing_experts == 0
        assert_same(run(problem, copied), run(problem, packed))
        few = {name: getattr(problem, name)[:1] for name in ("x", "ids", "weights", "dout")}  # by other kernels
        for one in (problem, dataclasses.replace(problem, **few)):
            assert_same(run(one, mapped), run(one, copied))
        for ours, want in zip(blobs_of(mapped), blobs):  # the way back from parts
            assert all(np.array_equal(a, b) for a, b in zip(ours, want))


@pytest.mark.parametrize("pools", [1, 3])
def test_mapped_experts_cost_no_memory(problem, pools):
    blobs = blobs_of(make_layer(problem))
    with using_threads(pools, pools):
        mapped, copied = empty_layer(problem).store, empty_layer(problem).store
        assert mapped.own_bytes == 0
        fill(mapped, blobs, "map_expert")
        fill(copied, blobs, "copy_expert")
        # The sums of each shard's columns of INT8, for the 160 rows of down in whole panels.
        sums = 4 * 160 * pools * CASE.experts if problem.format == "int8" and pools > 1 else 0
        assert mapped.own_bytes == sums
        assert copied.own_bytes == copied.packed_bytes >= sum(part.size for parts in blobs for part in parts)


@pytest.mark.parametrize("pools", [2, 3])
def test_exported_bytes_do_not_depend_on_shards(problem, pools):
    whole = blobs_of(make_layer(problem))
    with using_threads(pools, pools):
        for expert, parts in enumerate(blobs_of(make_layer(problem))):
            for name, ours, want in zip(("gate", "up", "down"), parts, whole[expert]):
                assert np.array_equal(ours, want), (expert, name)


@pytest.mark.parametrize("pools", [1, 3])
@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_mapped_and_packed_experts_mix_and_follow_the_last_call(name, pools):
    problem = make_problem(with_format(CASE, (name, 0, "bf16")))
    blobs = blobs_of(make_layer(problem))
    with using_threads(pools, pools):
        packed, mixed = make_layer(problem), empty_layer(problem)
        store = mixed.store
        store.map_expert(0, *blobs[1])
        store.map_expert(1, *blobs[1])
        store.load_expert(2, *(t[2].to(torch.bfloat16).contiguous() for t in (problem.gate, problem.up, problem.down)))
        store.copy_expert(0, *blobs[0])
        assert store.mapped_experts == 1
        assert_same(run(problem, mixed), run(problem, packed))
        store.map_expert(2, *blobs[2])
        assert store.mapped_experts == 2
        assert_same(run(problem, mixed), run(problem, packed))


def test_pools_that_came_later_compute_with_the_shards_that_there_are(problem):
    """A layer keeps its shards when the process gets another number of pools."""
    blobs = blobs_of(make_layer(problem))
    with using_threads(3, 3):
        mapped, copied = empty_layer(problem), empty_layer(problem)
        fill(mapped.store, blobs, "map_expert")
        fill(copied.store, blobs, "copy_expert")
    with using_threads(2, 2):
        assert_same(run(problem, mapped), run(problem, copied))


def test_layers_share_a_store():
    problem = make_problem(CASE)
    first = make_layer(problem)
    second = native().MoeLayer(first.store, "relu")
    assert second.store is first.store
    other = make_layer(dataclasses.replace(problem, activation="relu"))
    want = run(problem, other)
    del first
    gc.collect()
    assert_same(run(problem, second), want)


def test_wrong_memory_is_refused_and_changes_nothing():
    problem = make_problem(CASE)
    layer, empty = make_layer(problem), empty_layer(problem)
    blobs = blobs_of(layer)
    gate, up, down = blobs[0]
    short, crooked = gate[:-1], aligned_bytes(gate.size, offset=4)
    for method in (empty.store.map_expert, empty.store.copy_expert, layer.store.export_expert):
        with pytest.raises(ValueError, match="gate: expected .* bytes, got"):
            method(0, short, up, down)
        with pytest.raises(ValueError, match="down: expected .* bytes, got"):
            method(0, gate, up, down.view(np.uint32))
        with pytest.raises(ValueError, match="aligned to 64 bytes"):
            method(0, gate, crooked, down)
        for expert in (-1, CASE.experts):
            with pytest.raises(ValueError, match="expert index out of range"):
                method(expert, gate, up, down)
    with pytest.raises((ValueError, BufferError)):
        layer.store.export_expert(0, memoryview(gate).toreadonly(), up, down)
    with pytest.raises(ValueError, match="no weights yet"):
        empty.store.export_expert(0, gate, up, down)
    assert empty.store.missing_experts == CASE.experts


@pytest.mark.parametrize("pools", [1, 3])
def test_experts_are_not_exported_into_mapped_memory(pools):
    """Wherever in the matrices that shards of a mapped expert have parts of."""
    problem = make_problem(CASE)
    blobs = blobs_of(make_layer(problem))
    with using_threads(pools, pools):
        store = empty_layer(problem).store
        fill(store, blobs, "map_expert")
        gate, up, down = (aligned_bytes(part.size) for part in blobs[0])
        for mapped in (blobs[1][0], blobs[2][1]):
            with pytest.raises(ValueError, match="memory that no expert of the layer is mapped from"):
                store.export_expert(0, gate, mapped, down)
        with pytest.raises(ValueError, match="memory that no expert of the layer is mapped from"):
            store.export_expert(0, gate, up, blobs[1][2])


@pytest.mark.parametrize("names", BLOCKS)
@pytest.mark.parametrize("pools", [1, 3])
def test_block_types_move_as_they_are(names, pools):
    """Records of scales of every kind, a format per projection; whole layers and shards."""
    case = LayerCase(experts=2, tokens=9)
    packed, problem, _ = load_blocks(names, case, inter_blocks=5)
    blobs = blobs_of(packed)
    with using_threads(pools, pools):
        copied, mapped = empty_layer(problem, names), empty_layer(problem, names)
        fill(copied.store, blobs, "copy_expert")
        fill(mapped.store, blobs, "map_expert")
        direct, same, _ = load_blocks(names, case, inter_blocks=5)
        assert copied.store.num_shards == direct.store.num_shards == pools
        assert_same(run(problem, copied), run(same, direct))
        for rows in ("bf16", "bfp16"):
            one = dataclasses.replace(problem, rows=rows)
            assert_same(run(one, mapped), run(one, copied))
        for ours, from_parts, want in zip(blobs_of(copied), blobs_of(mapped), blobs):
            assert all(np.array_equal(a, b) and np.array_equal(c, b) for a, b, c in zip(ours, want, from_parts))
