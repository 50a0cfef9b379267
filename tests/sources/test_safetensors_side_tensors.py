"""What lies beside weights of a safetensors checkpoint is used or refused by name, never left out."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch

import kt_sft
from kt_sft import KTConfig
from kt_sft.errors import UnsupportedModel
from kt_sft.integrations.merge.checkpoint import MergedCheckpoint
from kt_sft.integrations.transformers.converting import open_source
from kt_sft.integrations.transformers.opened import OpenedModel
from kt_sft.models.spec import iter_routed_experts
from tests.helpers import quantized_checkpoints, tiny_models

ONE = torch.full((1,), 2.0)
SINGLE = "model.layers.1.mlp.experts.3.up_proj"
ATTENTION = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("beside")
    sizes = {"hidden_size": 64, "moe_intermediate_size": 96, "head_dim": 16}
    single = tiny_models.build("qwen3_moe", root / "single", **sizes)
    fused = tiny_models.build("gpt_oss", root / "fused", hidden_size=64, intermediate_size=96)
    return {
        "single": single,
        "fused": fused,
        "fp8": quantized_checkpoints.fp8_checkpoint(single, root / "fp8")[0],
        "int4": quantized_checkpoints.int4_checkpoint(single, root / "int4")[0],
        "mxfp4": quantized_checkpoints.mxfp4_checkpoint(fused, root / "mxfp4")[0],
    }


CASES = [
    *(
        ("single", f"{SINGLE}.{end}")
        for end in ("weight_scale", "weight_scale_2", "weight_zero_point", "bias", "g_idx")
    ),
    *(("single", f"{SINGLE}.{end}") for end in ("qzeros", "weight.absmax", "lora_scale")),
    ("single", "model.layers.1.mlp.experts.3.extra_proj.weight"),
    ("single", f"{ATTENTION}.weight_scale_2"),
    ("single", f"{ATTENTION}.weight_zero_point"),
    *(
        ("single", f"{ATTENTION}.{end}")
        for end in ("pre_quant_scale", "weight_scale_3", "weight_offset", "weight.scale")
    ),
    ("fp8", f"{SINGLE}.weight_scale_2"),
    ("int4", f"{SINGLE}.weight_zero_point"),
    ("int4", f"{SINGLE}.weight_g_idx"),
    ("int4", f"{ATTENTION}.weight_scale"),
    ("fused", "model.layers.1.mlp.experts.down_proj_scale"),
    ("fused", "model.layers.1.mlp.experts.gate_up_proj_blocks_2"),
    ("mxfp4", "model.layers.1.mlp.experts.down_proj_weight_scale_2"),
]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind} {name.split('layers.1.')[1]}" for kind, name in CASES])
def test_other_tensors_are_refused_at_every_door(checkpoints, tmp_path, kind, name):
    folder = shutil.copytree(checkpoints[kind], tmp_path / "m")
    tiny_models.rewrite(folder, lambda tensors: tensors | {name: ONE.clone()})
    for door in (kt_sft.load_model, open_source, lambda path: MergedCheckpoint(OpenedModel(path), [])):
        with pytest.raises(UnsupportedModel, match=f"tensor {name}: expected") as caught:
            door(folder)
        assert "\n" not in str(caught.value)


def test_as_weight_path(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["single"], tmp_path / "m")
    tiny_models.rewrite(folder, lambda tensors: tensors | {f"{SINGLE}.weight_scale": ONE.clone()})
    with pytest.raises(UnsupportedModel, match="weight_scale"):
        kt_sft.load_model(checkpoints["single"], KTConfig(threads=1, weight_path=str(folder)))


def test_scales_of_activations_change_nothing_and_are_named(checkpoints, tmp_path, caplog):
    folder = shutil.copytree(checkpoints["fp8"], tmp_path / "m")
    tiny_models.rewrite(folder, lambda tensors: tensors | {f"{SINGLE}.input_scale": ONE.clone()})
    with caplog.at_level(logging.WARNING, logger="kt_sft"):
        ours = kt_sft.load_model(folder, KTConfig(threads=1))
    assert [r.message for r in caplog.records if f"{SINGLE}.input_scale" in r.message]
    like = kt_sft.load_model(checkpoints["fp8"], KTConfig(threads=1))
    for (_, mine), (_, other) in zip(iter_routed_experts(ours), iter_routed_experts(like), strict=True):
        assert torch.equal(mine.unpack_expert(3)[1], other.unpack_expert(3)[1])


def test_zero_points_that_are_zero_are_symmetric(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["int4"], tmp_path / "m")
    zeros = torch.zeros(12, 2, dtype=torch.int32)
    tiny_models.rewrite(folder, lambda tensors: tensors | {f"{SINGLE}.weight_zero_point": zeros})
    ours, like = (kt_sft.load_model(path, KTConfig(threads=1)) for path in (folder, checkpoints["int4"]))
    ids = tiny_models.token_ids()
    assert torch.equal(ours(ids).logits, like(ids).logits)


def test_layers_that_the_model_has_not_are_left_out(tmp_path):
    folder = tiny_models.build("deepseek_v3", tmp_path / "m", extra_layer=True)
    kt_sft.load_model(folder, KTConfig(threads=1))
