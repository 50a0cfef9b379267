"""INT8 and INT4 experts: loaded from a bf16 checkpoint, computed with, merged into, and saved without a loss."""

from __future__ import annotations

import logging
import re

import pytest
import torch

import kt_sft
from kt_sft import memory
from kt_sft.errors import ConfigError, FormatError
from kt_sft.integrations import peft as kt_peft
from kt_sft.models.spec import ExpertsSpec, iter_routed_experts
from kt_sft.native import native
from tests.helpers import parity, tiny_models
from tests.helpers.tolerance import rel_l2
from tests.integrations.transformers.test_saving import tensors_of

FORMATS = ("INT8", "INT4")
WEIGHT_ERROR = {"INT8": 0.012, "INT4": 0.12}  # rel-L2 of normally distributed weights


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_models.build("qwen3_moe", tmp_path_factory.mktemp("formats"))


def load(directory, method, **config):
    return parity.load_ours(directory, method=method, **config)


def only_experts(model):
    return [experts for _, experts in iter_routed_experts(model)]


def stock_of(model, directory):
    """The plain model with the experts that ours has packed, without a further rounding."""
    stock = tiny_models.load_stock(directory)
    for name, experts in iter_routed_experts(model):
        target = stock.get_submodule(name)
        for index in range(experts.num_experts):
            inter, hidden = experts.intermediate_dim, experts.hidden_dim
            gate, up, down = (torch.empty(s) for s in ((inter, hidden), (inter, hidden), (hidden, inter)))
            experts.store.unpack_expert(index, gate, up, down, dtype="f32")
            target.gate_up_proj.data[index] = torch.cat([gate, up])
            target.down_proj.data[index] = down
    return stock


@pytest.mark.parametrize(
    ("family", "method", "group_size"),
    [("qwen3_moe", "INT8", 32), ("deepseek_v3", "INT4", 32), ("mixtral", "INT4", 64), ("deepseek_v2", "INT4", 128)],
)
def test_loaded_model_computes_with_the_rounded_weights(tmp_path, family, method, group_size):
    source = tiny_models.build(family, tmp_path)
    model = load(source, method, int4_group_size=group_size, expert_activations="bf16")
    exact = load(source, "BF16")
    for rounded, original in zip(only_experts(model), only_experts(exact), strict=True):
        sizes = (rounded.num_experts, rounded.hidden_dim, rounded.intermediate_dim)
        assert rounded.packed_bytes == native().ExpertStore.packed_bytes_for(*sizes, method.lower(), group_size)
        assert f", {method.lower()}" in repr(rounded)
        for one, other in zip(rounded.unpack_expert(2), original.unpack_expert(2), strict=True):
            assert 0 < rel_l2(one, other) < WEIGHT_ERROR[method]
    ids = tiny_models.token_ids()
    with torch.no_grad():
        ours, stock = model(ids).logits, stock_of(model, source)(ids).logits
        unrounded = tiny_models.load_stock(source)(ids).logits
    errors = (ours - stock).norm(dim=-1) / stock.norm(dim=-1)  # of each token
    assert (errors < 0.01).double().mean() > 0.9, "all but one whose router scores nearly tie"
    assert rel_l2(stock, unrounded) > 0.005


def test_f32_checkpoint_is_rounded_through_bf16(tmp_path, directory):
    source = tiny_models.build("qwen3_moe", tmp_path, dtype=torch.float32)
    ids = tiny_models.token_ids()
    with torch.no_grad():
        assert torch.equal(load(source, "INT8")(ids).logits, load(directory, "INT8")(ids).logits)


def test_auto_activations_are_int8_in_inference_only(directory, monkeypatch):
    experts = only_experts(load(directory, "INT8"))[0]
    exact = only_experts(load(directory, "BF16"))[0]
    monkeypatch.setattr("kt_sft.nn.routed_experts.native", lambda: FastBytes)
    with torch.no_grad():
        assert exact.rows() == "bf16"
        assert experts.rows() == "int8"
        assert experts.train().rows() == "bf16", "the first pass of a checkpointed layer"
        assert experts.eval().rows() == "int8"
    assert experts.rows() == "bf16"


class FastBytes:
    """A CPU with int8 dot instructions, as `rows` sees it."""

    @staticmethod
    def default_rows(weight_format):
        return "int8"


@pytest.mark.parametrize("method", FORMATS)
def test_int8_activations_reach_the_kernels_and_inference_equals_forward(directory, method):
    ids = tiny_models.token_ids()
    by_setting = {rows: load(directory, method, expert_activations=rows) for rows in ("bf16", "int8")}
    with torch.no_grad():
        logits = {rows: model(ids).logits for rows, model in by_setting.items()}
    assert 1e-4 < rel_l2(logits["int8"], logits["bf16"]) < 0.1
    for rows, model in by_setting.items():
        assert torch.equal(model.train()(ids).logits, logits[rows])


@pytest.mark.parametrize("rows", ["bf16", "int8"])
@pytest.mark.parametrize("method", FORMATS)
def test_recomputed_activations_give_the_same_gradients(directory, method, rows):
    ids, gradients = tiny_models.token_ids(), []
    for policy in ("retain", "recompute"):
        model = load(directory, method, expert_activations=rows, cpu_activation=policy)
        peft_model = parity.fill_lora(kt_peft.get_peft_model(model, parity.all_linear()))
        gradients.append(parity.logits_and_grads(peft_model.train(), ids))
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", FORMATS)
def test_saved_checkpoint_is_the_one_loaded_not_its_rounded_form(tmp_path, method, fused):
    source = tiny_models.build("mixtral", tmp_path / "source", fused=fused)
    kt_sft.load_model(source, kt_sft.KTConfig(method=method)).save_pretrained(tmp_path / "saved")
    expected, found = tensors_of(source), tensors_of(tmp_path / "saved")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_source_may_be_overwritten_by_the_save(tmp_path):
    source = tiny_models.build("qwen3_moe", tmp_path)
    expected = tensors_of(source)
    kt_sft.load_model(source, kt_sft.KTConfig(method="INT4")).save_pretrained(source)
    found = tensors_of(source)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("loss", ["missing", "changed"])
def test_without_the_source_the_rounded_experts_are_saved_with_one_warning(tmp_path, caplog, loss):
    source = tiny_models.build("qwen3_moe", tmp_path / "source")
    original = tensors_of(source)
    model = kt_sft.load_model(source, kt_sft.KTConfig(method="INT4"))
    file = source / "model.safetensors"
    if loss == "missing":
        file.unlink()
    else:
        tiny_models.rewrite(source, lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()})
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "saved")
    warnings = [record.getMessage() for record in caplog.records if "experts are saved" in record.getMessage()]
    assert len(warnings) == 1 and loss in warnings[0] and "INT4" in warnings[0] and "8 to 10 %" in warnings[0]
    saved = tensors_of(tmp_path / "saved")
    for name, experts in iter_routed_experts(model):
        key = f"{name}.3.up_proj.weight"
        assert torch.equal(saved[key], experts.unpack_expert(3)[1])
        assert 0 < rel_l2(saved[key], original[key]) < WEIGHT_ERROR["INT4"]


@pytest.mark.parametrize("method", FORMATS)
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, method):
    source = tiny_models.build("qwen3_moe", tmp_path)
    key = "model.layers.1.mlp.experts.2.up_proj.weight"

    def spoil(tensors):
        tensors[key][3, 5] = float("nan")
        return tensors

    tiny_models.rewrite(source, spoil)
    place = rf"tensor {re.escape(key)} \(expert 2 of model\.layers\.1\.mlp\.experts\)"
    with pytest.raises(FormatError, match=f"{place}: expected finite numbers, found nan at row 3, column 5"):
        kt_sft.load_model(source, kt_sft.KTConfig(method=method))


@pytest.fixture(scope="module")
def adapter(directory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    parity.fill_lora(kt_peft.get_peft_model(load(directory, "BF16"), parity.all_linear())).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", FORMATS)
def test_merged_model_is_saved_as_bf16_experts_would_be(tmp_path, directory, adapter, method):
    for name in ("BF16", method):
        model = kt_peft.load_adapter(load(directory, name), adapter).merge_and_unload()
        model.save_pretrained(tmp_path / name)
    expected, found = tensors_of(tmp_path / "BF16"), tensors_of(tmp_path / method)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    untouched = tensors_of(directory)
    assert any(
        not torch.equal(found[key].to(untouched[key].dtype), untouched[key]) for key in found if "experts" in key
    )


def matrices(model, projection):
    """Gate (0), up (1) or down (2) of every expert, in one row."""
    parts = (e.unpack_expert(index)[projection] for e in only_experts(model) for index in range(e.num_experts))
    return torch.cat([part.double().flatten() for part in parts])


@pytest.mark.parametrize(("method", "alpha"), [("INT8", 0.06), ("INT4", 1.0)])
def test_small_delta_survives_merging_into_rounded_weights(directory, method, alpha):
    """Below half a step of the format: added to rounded weights, nearly nothing of it would be left."""

    def merged(name):
        model = kt_peft.get_peft_model(load(directory, name), parity.all_linear(lora_alpha=alpha))
        return parity.fill_lora(model).merge_and_unload()

    after, exact = merged(method), merged("BF16")
    before, base = load(directory, method), load(directory, "BF16")
    for projection in range(3):
        moved = matrices(after, projection) - matrices(before, projection)
        delta = matrices(exact, projection) - matrices(base, projection)
        half_step = (matrices(before, projection) - matrices(base, projection)).abs().max()
        assert delta.abs().mean() < 0.2 * half_step
        slope = float(moved @ delta / (delta @ delta))
        assert 0.9 < slope < 1.1, f"{projection}: {slope}"


def test_merging_without_the_source_is_refused(tmp_path, adapter):
    source = tiny_models.build("qwen3_moe", tmp_path)
    peft_model = kt_peft.load_adapter(load(source, "INT8"), adapter)
    (source / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"model\.safetensors: checkpoint of the experts: .*found missing; put the"):
        peft_model.merge_and_unload()


def test_merging_into_experts_set_by_hand_is_refused(directory, adapter):
    model = load(directory, "INT8")
    experts = only_experts(model)[0]
    experts.load_expert(4, *experts.unpack_expert(4))
    with pytest.raises(ConfigError, match=r"merge: expert 4 .* load the model with method BF16"):
        kt_peft.load_adapter(model, adapter).merge_and_unload()


def test_adapter_of_rounded_experts_is_the_same_kind_of_file(tmp_path, directory, adapter):
    peft_model = parity.fill_lora(kt_peft.get_peft_model(load(directory, "INT4"), parity.all_linear()))
    peft_model.save_pretrained(tmp_path)
    one, other = tensors_of(adapter), tensors_of(tmp_path)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_memory_message_names_the_formats_that_fit(monkeypatch):
    spec = ExpertsSpec(num_experts=64, hidden=2048, inter=1408)
    gib = 1 << 30
    monkeypatch.setattr(
        "kt_sft.memory.available_memory", lambda: kt_sft.memory.AvailableMemory(gib // 2, "the machine")
    )
    with pytest.raises(MemoryError, match=r"INT4 needs 0\.3 GiB") as caught:
        memory.check_experts({"a": spec}, 0, {"a": "bf16"}, 32, method="BF16")
    assert "INT8 needs" not in str(caught.value)
    memory.check_experts({"a": spec}, 0, {"a": "int4"}, 32, method="INT4")
