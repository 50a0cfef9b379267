"""Our dequantisation of every GGUF type against that of PyPI's gguf, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from kt_sft.formats.ggml_types import GGML_TYPES
from kt_sft.native import native

DECODED = sorted({kind.name for kind in quants._type_traits} | {"F32", "F16"})
# The scale of a block in f16, where it has one: (byte offset, how many).
F16_SCALES = {
    "Q2_K": (80, 2),
    "Q3_K": (108, 1),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208, 1),
    "TQ1_0": (52, 1),
    "TQ2_0": (64, 1),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
}
WITHOUT = {"F32", "F16", "BF16", "MXFP4", "NVFP4", "IQ1_M"}


def random_rows(name: str, rows: int, blocks: int, *, finite: bool) -> np.ndarray:
    """Random bytes `[rows, row_bytes]`; `finite` replaces the scales by ordinary numbers."""
    kind = GGML_TYPES[name]
    data = np.random.default_rng(kind.number).integers(0, 256, (rows * blocks, kind.block_bytes), dtype=np.uint8)
    if finite and name not in WITHOUT:
        at, count = F16_SCALES.get(name, (0, 1))
        scales = np.random.default_rng(3).normal(0, 0.1, (rows * blocks, count)).astype(np.float16)
        data[:, at : at + 2 * count] = scales.view(np.uint8)
    return data.reshape(rows, blocks * kind.block_bytes)


def expected(name: str, data: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.dequantize(data, GGMLQuantizationType[name])


@pytest.mark.parametrize("finite", [True, False], ids=["finite scales", "any bytes"])
@pytest.mark.parametrize("name", DECODED)
def test_bits_are_those_of_gguf(name, finite):
    data = random_rows(name, rows=7, blocks=37, finite=finite)
    want = expected(name, data)
    out = torch.full(want.shape, 7.0)
    native().dequantize_gguf(name, torch.from_numpy(data), out)
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(out.numpy()), nan)
    assert np.array_equal(out.numpy().view(np.uint32)[~nan], want.view(np.uint32)[~nan])
    if finite and name not in WITHOUT:
        assert np.isfinite(want).all() and want.std() > 0
    half = torch.full(want.shape, 7.0, dtype=torch.bfloat16)
    native().dequantize_gguf(name, torch.from_numpy(data), half)
    assert torch.equal(half[~torch.from_numpy(nan)], torch.from_numpy(want).bfloat16()[~torch.from_numpy(nan)])


@pytest.mark.parametrize("name", DECODED)
def test_table_of_types_is_that_of_gguf(name):
    from gguf.constants import GGML_QUANT_SIZES

    kind = GGML_TYPES[name]
    assert GGML_QUANT_SIZES[GGMLQuantizationType(kind.number)] == (kind.block_elements, kind.block_bytes)
    assert native().can_dequantize_gguf(name)


def test_rows_with_strides_and_many_tasks():
    """A slice of a wider tensor into a slice of a wider result, cut into several tasks."""
    data = torch.from_numpy(random_rows("Q4_K", rows=301, blocks=5, finite=True))
    want = torch.from_numpy(expected("Q4_K", data.numpy()))
    wide = torch.zeros(301, 4 * 256)
    native().dequantize_gguf("Q4_K", data[:, 144 : 144 * 4], wide[:, : 3 * 256])
    assert torch.equal(wide[:, : 3 * 256], want[:, 256 : 4 * 256])
    assert not wide[:, 3 * 256 :].any()


def test_wrong_arguments_are_refused():
    blocks = torch.zeros(3, 36, dtype=torch.uint8)
    with pytest.raises(ValueError, match="expected a GGUF type of numbers, got Q8_K"):
        native().dequantize_gguf("Q8_K", blocks, torch.zeros(3, 64))
    with pytest.raises(ValueError, match=r"out: expected shape \[3, 64\], got f32 \[3, 32\]"):
        native().dequantize_gguf("Q4_0", blocks, torch.zeros(3, 32))
    with pytest.raises(ValueError, match="blocks: expected rows of whole Q8_0 blocks"):
        native().dequantize_gguf("Q8_0", blocks, torch.zeros(3, 32))
    with pytest.raises(ValueError, match="blocks: expected dtype u8"):
        native().dequantize_gguf("Q4_0", blocks.char(), torch.zeros(3, 64))
