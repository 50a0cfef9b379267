"""Packed experts from outside: mapped or copied they compute, bit for bit, what packed ones compute."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from kt_sft.native import native
from tests.helpers.layers import LayerCase, make_layer, make_problem, run, using_threads, with_format
from tests.numerics.test_block_types import load as load_blocks

# Three shards of down end inside the sizes' last tile; int4 groups of 128 have two.
CASE = LayerCase(experts=3, hidden=150, inter=300, tokens=11, top_k=2, rank=3, seed=50)


def aligned_bytes(count: int, offset: int = 0) -> np.ndarray:
    """Random bytes, so that what is not written shows, `offset` bytes after a multiple of 64."""
    memory = np.random.default_rng(0).integers(0, 256, count + 128, dtype=np.uint8)
    start = -memory.ctypes.data % 64 + offset
    return memory[start : start + count]


def blobs_of(layer) -> list[list[np.ndarray]]:
    """(gate, up, down) of every expert as the layer exports them."""
    blobs = [[aligned_bytes(size) for size in layer.blob_bytes] for _ in range(layer.num_experts)]
    for expert, parts in enumerate(blobs):
        layer.export_expert(expert, *parts)
    return blobs


def empty_layer(problem):
    experts, inter, hidden = problem.gate.shape
    return native().MoeLayer(experts, hidden, inter, problem.format, group_size=problem.group or 32)


def assert_same(a: dict, b: dict) -> None:
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def problem(weights):
    return make_problem(with_format(CASE, weights))


def test_mapped_equals_packed(problem):
    packed = make_layer(problem)
    mapped = empty_layer(problem)
    for expert, parts in enumerate(blobs_of(packed)):
        mapped.map_expert(expert, *(memoryview(part).toreadonly() for part in parts))
    gc.collect()  # the layer alone keeps the memory now
    assert (mapped.mapped_experts, packed.mapped_experts) == (CASE.experts, 0)
    assert_same(run(problem, mapped), run(problem, packed))


@pytest.mark.parametrize("pools", [1, 2, 3])
def test_copied_equals_packed_with_any_number_of_shards(problem, pools):
    blobs = blobs_of(make_layer(problem))
    with using_threads(pools + 1, pools):
        packed, copied = make_layer(problem), empty_layer(problem)
        assert copied.num_shards == pools
        for expert, parts in enumerate(blobs):
            copied.copy_expert(expert, *parts)
        assert copied.mapped_experts == copied.missing_experts == 0
        assert_same(run(problem, copied), run(problem, packed))


@pytest.mark.parametrize("pools", [2, 3])
def test_exported_bytes_do_not_depend_on_shards(problem, pools):
    whole = blobs_of(make_layer(problem))
    with using_threads(pools, pools):
        for expert, parts in enumerate(blobs_of(make_layer(problem))):
            for name, ours, want in zip(("gate", "up", "down"), parts, whole[expert]):
                assert np.array_equal(ours, want), (expert, name)


def test_mapped_and_packed_experts_mix_and_follow_the_last_call():
    problem = make_problem(CASE)
    packed, mixed = make_layer(problem), empty_layer(problem)
    blobs = blobs_of(packed)
    mixed.map_expert(0, *blobs[1])
    mixed.map_expert(1, *blobs[1])
    mixed.load_expert(2, *(t[2].to(torch.bfloat16).contiguous() for t in (problem.gate, problem.up, problem.down)))
    mixed.copy_expert(0, *blobs[0])
    assert mixed.mapped_experts == 1
    assert_same(run(problem, mixed), run(problem, packed))


def test_wrong_memory_is_refused_and_changes_nothing():
    problem = make_problem(CASE)
    layer, empty = make_layer(problem), empty_layer(problem)
    blobs = blobs_of(layer)
    gate, up, down = blobs[0]
    short, crooked = gate[:-1], aligned_bytes(gate.size, offset=4)
    for method in (empty.map_expert, empty.copy_expert, layer.export_expert):
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
        layer.export_expert(0, memoryview(gate).toreadonly(), up, down)
    with pytest.raises(ValueError, match="no weights yet"):
        empty.export_expert(0, gate, up, down)
    assert empty.missing_experts == CASE.experts
    with using_threads(2, 2), pytest.raises(ValueError, match="one shard"):
        empty_layer(problem).map_expert(0, gate, up, down)


@pytest.mark.parametrize("names", [("q4_k", "q5_k", "q6_k"), ("iq4_xs", "bf16", "q5_0"), ("mxfp4", "int8", "f16")])
@pytest.mark.parametrize("pools", [1, 3])
def test_block_types_move_as_they_are(names, pools):
    """Records of scales of every kind, a format per projection; whole layers and shards."""
    case = LayerCase(experts=2, tokens=9)
    packed, problem, _ = load_blocks(names, case, inter_blocks=3)
    blobs = blobs_of(packed)
    experts, inter, hidden = problem.gate.shape
    with using_threads(pools, pools):
        copied = native().MoeLayer(experts, hidden, inter, names)
        for expert, parts in enumerate(blobs):
            copied.copy_expert(expert, *parts)
        direct, same, _ = load_blocks(names, case, inter_blocks=3)
        assert copied.num_shards == direct.num_shards == pools
        assert_same(run(problem, copied), run(same, direct))
        for ours, want in zip(blobs_of(copied), blobs):
            assert all(np.array_equal(a, b) for a, b in zip(ours, want))
