"""Adapters that lack tensors of experts are refused by the tensor's name, whichever is missing."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file

import kt_sft
from kt_sft.errors import FormatError
from tests.helpers import adapters


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gaps")
    adapters.make("qwen3_moe", folder)
    return folder


@pytest.mark.parametrize("tail", ["lora_A", "lora_B", "base_layer.lora_A", "base_layer.lora_B"])
def test_missing_tensors_of_the_experts(root, tmp_path, tail):
    folder = shutil.copytree(root / "adapter", tmp_path / "adapter")
    name = f"base_model.model.model.layers.1.mlp.experts.{tail}.weight"
    assert name in load_file(folder / "adapter_model.safetensors")
    adapters.damaged(lambda tensors: {key: t for key, t in tensors.items() if key != name})(folder)
    with pytest.raises(FormatError, match="missing"):
        kt_sft.load_adapter(kt_sft.load_model(root / "base"), folder)
