"""Parts of quantised tensors: what is read of a matrix is that part of the whole one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from kt_sft.formats.checkpoint import open_weights
from tests.helpers import quantized_checkpoints, tiny_models


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    root = tmp_path_factory.mktemp("fp8")
    return quantized_checkpoints.fp8_checkpoint(tiny_models.build("deepseek_v3", root / "source"), root)


def test_any_rows_of_an_fp8_matrix_are_those_of_the_whole(fp8):
    """Blocks of 16 rows have a scale each; parts begin and end within blocks and on their borders."""
    folder, twin = fp8
    exact = {name: tensor for file in twin.glob("*.safetensors") for name, tensor in load_file(file).items()}
    index = open_weights(folder)
    matrices = [name for name in index.quantized if len(index.info(name).shape) == 2 and index.info(name).shape[0] > 33]
    assert matrices
    for name in matrices:
        assert torch.equal(index.read(name), exact[name]), name
        rows = index.info(name).shape[0]
        for begin, end in ((0, 5), (3, 16), (16, 32), (17, 33), (5, rows), (rows - 1, rows)):
            assert torch.equal(index.read(name, (slice(begin, end),)), exact[name][begin:end]), (name, begin, end)
        assert torch.equal(index.read(name, (20,)), exact[name][20])
        assert torch.equal(index.read(name, (slice(1, rows, 2),)), exact[name][1::2])
