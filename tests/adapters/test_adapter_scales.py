"""Ranks and scales of adapters, whatever their config says them with: against what stock PEFT makes of it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

import kt_sft
from kt_sft.adapters import forms, gguf
from kt_sft.formats import gguf_writer
from tests.helpers import adapters, tiny_models
from tests.helpers.adapters import convert, edit, opened

PREFIX = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixtral")
    adapters.make("mixtral", root)
    return root


@pytest.mark.parametrize("is_rslora", [False, True], ids=["plain", "rslora"])
def test_scale_and_rank_of_every_target_are_pefts(tmp_path, is_rslora):
    """Keys of patterns are whole names or ends of them: `q` and `mlp.experts.down` name nothing."""
    base = tiny_models.build("qwen3_moe", tmp_path / "base")
    config = LoraConfig(
        r=4, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=is_rslora,
        rank_pattern={"q_proj": 2, "mlp.experts.down_proj": 3},
        alpha_pattern={"layers.1.self_attn.k_proj": 7, "mlp.experts.gate_up_proj": 2.5},
    )  # fmt: skip
    model = kt_sft.get_peft_model(kt_sft.load_model(base), config)
    adapters.randomise(model, seed=1)
    model.save_pretrained(tmp_path / "adapter")
    ranks, alphas = ({**getattr(config, f"{name}_pattern")} for name in ("rank", "alpha"))
    edit(tmp_path / "adapter", rank_pattern={"q": 1, **ranks}, alpha_pattern={"mlp.experts.down": 90, "v": 8, **alphas})
    wanted = adapters.peft_deltas(tmp_path)
    adapters.assert_same(adapters.deltas(opened(tmp_path / "adapter", tmp_path)), wanted)
    for form in forms.FORMS:
        written = forms.convert(opened(tmp_path / "adapter", tmp_path), form, tmp_path / form)
        adapters.assert_same(adapters.deltas(opened(written, tmp_path)), wanted)


def test_layers_of_different_ranks_load_in_stock_peft(mixtral, tmp_path):
    """Pairs per expert, of rank 3 in one layer and 2 in the other, and of two scales therefore."""
    source = convert(mixtral, "vllm", tmp_path / "pairs")
    tensors = load_file(source / "adapter_model.safetensors")
    for name in [name for name in tensors if ".layers.1." in name and ".experts." in name]:
        tensor = tensors[name]
        tensors[name] = (tensor[:2] if ".lora_A." in name else tensor[:, :2]).contiguous()
    save_file(tensors, source / "adapter_model.safetensors")
    edit(source, rank_pattern={r"layers\.1\.block_sparse_moe\.experts\.\d+\.w[123]": 2})
    wanted = adapters.deltas(opened(source, mixtral))
    stock = tiny_models.load_stock(mixtral / "base")
    folder = forms.convert(opened(source, mixtral), "peft-0.18", tmp_path / "fused")
    model = PeftModel.from_pretrained(stock, folder)
    module = "model.layers.1.block_sparse_moe.experts"
    module = module if f"{module}.down_proj" in wanted else "model.layers.1.mlp.experts"
    wrapper = model.get_submodule(f"base_model.model.{module}")
    found = wrapper.get_delta_weight("default").double()
    assert (found - wanted[f"{module}.down_proj"]).abs().max() < 1e-5
    adapters.assert_same(adapters.deltas(opened(folder, mixtral)), wanted)


def test_names_that_are_not_the_checkpoints_own(mixtral, tmp_path):
    """SGLang calls Mixtral's matrices gate_proj, up_proj and down_proj; the checkpoint w1, w3 and w2."""
    source = convert(mixtral, "vllm", tmp_path / "pairs")
    tensors, module = load_file(source / "adapter_model.safetensors"), next(iter(opened(source, mixtral).experts))
    renamed = {}
    for name, tensor in tensors.items():
        head, is_expert, tail = name.partition(".experts.")
        for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            tail = tail.replace(f".{old}.", f".{new}.")
        block = module.rpartition(".")[0].rpartition(".")[2]
        layer = head.rpartition(".")[0]
        renamed[f"{layer}.{block}.experts.{tail}" if is_expert else name] = tensor
    assert renamed.keys() != tensors.keys()
    wanted = adapters.deltas(opened(source, mixtral))
    save_file(renamed, source / "adapter_model.safetensors")
    adapters.assert_same(adapters.deltas(opened(source, mixtral)), wanted)


def test_gguf_alpha_of_zero_is_a_scale_of_one(mixtral, tmp_path):
    """As llama.cpp has it."""
    adapter = opened(mixtral / "adapter", mixtral)
    metadata, plan, pieces = gguf.write(adapter)
    file = tmp_path / "a.gguf"
    gguf_writer.write(file, metadata | {"adapter.lora.alpha": 0.0}, plan, pieces)
    found, wanted = adapters.deltas(opened(file, mixtral)), adapters.deltas(adapter)
    adapters.assert_same(found, {name: delta / (5 / 3) for name, delta in wanted.items()})


def test_pattern_for_one_layer_reaches_the_model(tmp_path):
    """Logits of stock PEFT, of an adapter whose layers differ in rank and scale."""
    base = tiny_models.build("qwen3_moe", tmp_path / "base")
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules="all-linear", task_type="CAUSAL_LM",
        rank_pattern={"layers.1.self_attn.o_proj": 5}, alpha_pattern={"layers.0.self_attn.v_proj": 11},
    )  # fmt: skip
    model = kt_sft.get_peft_model(kt_sft.load_model(base, dtype=torch.float32), config)
    adapters.randomise(model, seed=2)
    model.save_pretrained(tmp_path / "adapter")
    assert (
        load_file(tmp_path / "adapter" / "adapter_model.safetensors")[
            f"{PREFIX}.1.self_attn.o_proj.lora_A.weight"
        ].shape[0]
        == 5
    )
    edit(tmp_path / "adapter", base_model_name_or_path=str(base))
    ids = tiny_models.token_ids()
    with torch.no_grad():
        wanted, found = adapters.peft_model(tmp_path)(ids).logits, model.eval()(ids).logits
    assert (found - wanted).norm() < 0.02 * wanted.norm()
