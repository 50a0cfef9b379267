"""load_model on every family: right weights, right logits, nothing of the experts read by transformers."""

from __future__ import annotations

import json
import types

import pytest
import torch
import transformers
from torch import nn

import kt_sft
from kt_sft import KTConfig, runtime
from kt_sft.integrations.transformers import loading as loading
from kt_sft.integrations.transformers.opened import open_model
from kt_sft.integrations.transformers.quantizer import KTExpertsConfig
from kt_sft.models.spec import iter_routed_experts
from tests.helpers import tiny_models

FORMS = {
    "per-expert": {},
    "fused": {"fused": True},
    "sharded": {"sharded": True},
    "fused-sharded": {"fused": True, "sharded": True},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Directory of a tiny checkpoint, written once per form."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(family, form="per-expert", **extra):
        place = root / "-".join([family, form, *(f"{k}={v}" for k, v in extra.items())])
        return tiny_models.build(family, place, **FORMS[form], **extra)

    return get


@pytest.fixture
def keys_read(monkeypatch):
    """Names of the tensors whose data transformers reads."""
    read = []
    real_open = transformers.modeling_utils.safe_open

    class Slice:
        def __init__(self, part, name):
            self.part, self.name = part, name

        def __getattr__(self, attribute):
            return getattr(self.part, attribute)

        def __getitem__(self, rows):
            read.append(self.name)
            return self.part[rows]

    class File:
        def __init__(self, *args, **kwargs):
            self.file = real_open(*args, **kwargs)

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            return Slice(self.file.get_slice(name), name)

        def __exit__(self, *error):
            return self.file.__exit__(*error)

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", File)
    return read


def round_bf16(x):
    return x.to(torch.bfloat16).double()


class RoundedExperts(nn.Module):
    """The experts' formula in float64 with the kernels' rounding points (docs/numerics.md): bf16 x and h."""

    def __init__(self, stock):
        super().__init__()
        self.gate_up, self.down = stock.gate_up_proj.detach().double(), stock.down_proj.detach().double()

    def forward(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x, dtype=torch.float64)  # [tokens, hidden]
        for expert in range(self.down.shape[0]):
            tokens, slots = torch.where(topk_ids == expert)
            g, u = (round_bf16(x[tokens]) @ self.gate_up[expert].T).chunk(2, dim=-1)  # [rows, inter] each
            h = round_bf16(nn.functional.silu(g) * u)
            out.index_add_(0, tokens, (h @ self.down[expert].T) * topk_weights[tokens, slots, None])
        return out.to(x.dtype)


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits.double()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_logits_equal_stock_up_to_the_experts_rounding(checkpoint, family, form):
    """The bound is computed: how far bf16 rounding inside the experts alone moves the float64 model's logits."""
    ids = tiny_models.token_ids()
    stock = tiny_models.model(family).double()
    truth = logits_of(stock, ids)
    for layer in stock.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = RoundedExperts(layer.mlp.experts)
    rounded = logits_of(stock, ids)
    moved = (rounded - truth).abs().max()
    ours = logits_of(kt_sft.load_model(checkpoint(family, form), dtype=torch.float32), ids)
    assert 0 < moved < 0.02 * truth.abs().max()
    assert (ours - truth).abs().max() <= 2 * moved
    # Against the model with the same rounding points only summation order is left, and the few roundings that it tips.
    assert (ours - rounded).abs().max() <= moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fused", [False, True])
def test_packed_experts_hold_the_checkpoints_weights_exactly(tmp_path, dtype, fused):
    directory = tiny_models.build("qwen3_moe", tmp_path, dtype=dtype, fused=fused)
    stock = tiny_models.load_stock(directory, dtype)
    model = kt_sft.load_model(directory)
    names = []
    for name, experts in iter_routed_experts(model):
        names.append(name)
        reference = stock.get_submodule(name)
        for expert in range(reference.num_experts):
            gate, up, down = experts.unpack_expert(expert)
            expected = reference.gate_up_proj[expert].to(torch.bfloat16)  # [2 * inter, hidden]
            assert torch.equal(torch.cat([gate, up]), expected)
            assert torch.equal(down, reference.down_proj[expert].to(torch.bfloat16))
    assert names == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


@pytest.mark.parametrize("form", ["per-expert", "fused"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_transformers_reads_no_expert_tensor_and_misses_none(checkpoint, keys_read, family, form):
    extra = {"extra_layer": True} if family == "deepseek_v3" else {}
    model, info = kt_sft.load_model(checkpoint(family, form, **extra), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert keys_read and not [name for name in keys_read if ".experts." in name]
    assert any("norm" in name for name in keys_read)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_loaded_model_looks_ordinary(checkpoint, tmp_path):
    config = KTConfig(chunk_size=64, cpu_activation="recompute")
    model = kt_sft.load_model(checkpoint("qwen3_moe"), config)
    assert model.kt_config == config
    assert model.dtype == torch.bfloat16 and not model.training
    assert not getattr(model, "is_quantized", False) and not getattr(model.config, "_is_quantized", False)
    for name in ("hf_quantizer", "quantization_method"):
        assert getattr(model, name, None) is None
    assert "_keys_to_ignore_on_load_unexpected" not in model.__dict__
    model.config.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    stock = tiny_models.model("qwen3_moe")
    assert model.num_parameters() == stock.num_parameters()


def test_users_config_object_is_left_alone(checkpoint):
    config = transformers.AutoConfig.from_pretrained(checkpoint("mixtral"))
    hook = KTExpertsConfig(open_model(checkpoint("mixtral"), KTConfig()))
    transformers.AutoModelForCausalLM.from_pretrained(checkpoint("mixtral"), config=config, quantization_config=hook)
    assert not hasattr(config, "quantization_config")


def test_weight_path_overrides_where_experts_come_from(checkpoint):
    other = checkpoint("mixtral", "fused", seed=5)
    model = kt_sft.load_model(checkpoint("mixtral"), KTConfig(weight_path=str(other)))
    stock, foreign = tiny_models.model("mixtral"), tiny_models.model("mixtral", seed=5)
    assert torch.equal(model.lm_head.weight, stock.lm_head.weight.to(torch.bfloat16))
    name, experts = next(iter_routed_experts(model))
    expected = foreign.get_submodule(name).down_proj[1].to(torch.bfloat16)
    assert torch.equal(experts.unpack_expert(1)[2], expected)


def test_hook_serves_from_pretrained_of_any_auto_class(checkpoint):
    directory = checkpoint("deepseek_v2")
    hook = KTExpertsConfig(open_model(directory, KTConfig()))
    backbone = transformers.AutoModel.from_pretrained(directory, quantization_config=hook)
    assert [name for name, _ in iter_routed_experts(backbone)] == ["layers.1.mlp.experts", "layers.2.mlp.experts"]
    assert backbone.kt_config == KTConfig()
    assert json.loads(hook.to_json_string())["kt_config"]["method"] == "BF16"


def test_two_loads_in_one_process_do_not_disturb_each_other(checkpoint):
    ids = tiny_models.token_ids()
    first = kt_sft.load_model(checkpoint("qwen3_moe"))
    before = logits_of(first, ids)
    kt_sft.load_model(checkpoint("mixtral"))
    assert torch.equal(logits_of(first, ids), before)


@pytest.fixture
def library(monkeypatch):
    """Stand-in for the native module that records how it is set up."""
    calls = types.SimpleNamespace(isa=None, threads=None)
    stub = types.SimpleNamespace(
        isa_detected=lambda: ["scalar", "avx2"],
        set_isa=lambda name: setattr(calls, "isa", name),
        default_threads=lambda: 8,
        cpu_info=lambda: {"numa_nodes": [[0, 1, 2, 3], [4, 5, 6, 7]], "logical_cpus": 8},
        set_threads=lambda threads, pools: setattr(calls, "threads", (threads, pools)),
        calls=calls,
    )
    monkeypatch.setattr(runtime, "native", lambda: stub)
    for name in ("KT_SFT_ISA", "KT_SFT_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return stub


@pytest.mark.parametrize(
    ("config", "environment", "threads", "isa"),
    [
        ({}, {}, (8, 2), None),
        ({}, {"LOCAL_WORLD_SIZE": "4"}, (2, 2), None),
        ({}, {"LOCAL_WORLD_SIZE": "16"}, (1, 1), None),
        ({"threads": 3, "threadpool_count": 1}, {"LOCAL_WORLD_SIZE": "4"}, (3, 1), None),
        ({"threads": 3}, {"KT_SFT_THREADS": "5"}, (5, 2), None),
        ({"threads": 64}, {}, (8, 2), None),  # never more than CPUs
        ({"threadpool_count": 4}, {}, (8, 2), None),  # never more than NUMA nodes
        ({"threads": 1, "threadpool_count": 2}, {}, (1, 1), None),  # never more than threads
        ({"isa": "avx2"}, {}, (8, 2), "avx2"),
        ({"isa": "avx2"}, {"KT_SFT_ISA": "scalar"}, (8, 2), "scalar"),
    ],
)
def test_threads_and_isa_come_from_environment_configuration_machine(
    library, monkeypatch, config, environment, threads, isa
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    runtime.prepare_native(KTConfig(**config))
    assert (library.calls.threads, library.calls.isa) == (threads, isa)
