"""What lies beside the experts' weights in a GGUF file is multiplied in or refused by name, and gate and up may be one.

The truth: bf16 of (the stored numbers in f32 times the scale), and the stock model that has these weights.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, quants

import kt_sft
from kt_sft import KTConfig
from kt_sft.errors import FormatError, UnsupportedModel
from kt_sft.models.spec import iter_routed_experts
from kt_sft.operator.moe import KTMoEWrapper
from tests.helpers import gguf_files, gguf_models, tiny_models
from tests.integrations.gguf.test_gguf_model import contents

SIZES = {"hidden_size": 64, "moe_intermediate_size": 96, "head_dim": 16}
EXPERTS = 6
SIDES = ("gate", "up", "down")
Matrices = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return tiny_models.build("qwen3_moe", tmp_path_factory.mktemp("side") / "plain", num_experts=EXPERTS, **SIZES)


@pytest.fixture(scope="module")
def stock(plain) -> dict[int, Matrices]:
    """Gate, up and down `[experts, out, in]` of each layer, f32."""
    found = {}
    for name, module in tiny_models.load_stock(plain).named_modules():
        if name.endswith("mlp.experts"):
            gate, up = module.gate_up_proj.detach().chunk(2, dim=1)
            weights = {"gate": gate, "up": up, "down": module.down_proj.detach()}
            found[int(name.split(".")[2])] = {side: weight.float() for side, weight in weights.items()}
    return found


def scales_of(weight: torch.Tensor) -> torch.Tensor:
    """One number per expert, none of them 1 nor a power of two."""
    return weight.abs().amax(dim=(1, 2)) / 100


def numbers(encoded: gguf_files.Encoded) -> torch.Tensor:
    """By PyPI's gguf, f32."""
    kind, shape, data = encoded
    rows = data.reshape(-1, data.size // (torch.Size(shape[:-1]).numel()))
    return torch.from_numpy(quants.dequantize(rows, GGMLQuantizationType[kind]).reshape(shape))


def write(file: Path, stock, kind: str, form: str, *, scaled: bool) -> tuple[Path, dict[int, Matrices]]:
    """A file with the experts in one form, and what its weights are, bf16."""
    tensors: dict[str, gguf_files.Encoded] = {}
    wanted: dict[int, Matrices] = {}
    for layer, sides in stock.items():
        groups = {"gate_up": torch.cat([sides["gate"], sides["up"]], dim=1), "down": sides["down"]}
        groups = groups if form == "fused" else dict(sides)
        found = {}
        for side, weight in groups.items():
            scale = scales_of(weight) if scaled else torch.ones(len(weight))
            stored = gguf_files.encode((weight / scale[:, None, None]).numpy(), kind)
            found[side] = (numbers(stored) * scale[:, None, None]).bfloat16()
            base = f"blk.{layer}.ffn_{side}"
            if form == "single":
                rows = stored[2].reshape(len(weight), -1)
                tensors |= {f"{base}.{e}.weight": (kind, stored[1][1:], rows[e]) for e in range(len(weight))}
                tensors |= {f"{base}.{e}.scale": gguf_files.encode(scale[e : e + 1].numpy(), "F32") for e in range(6)}
            else:
                tensors[f"{base}_exps.weight"] = stored
                tensors[f"{base}_exps.scale"] = gguf_files.encode(scale.numpy(), "F32")
        if form == "fused":
            found["gate"], found["up"] = found.pop("gate_up").chunk(2, dim=1)
        wanted[layer] = found
    if not scaled:
        tensors = {name: value for name, value in tensors.items() if not name.endswith(".scale")}
    return gguf_files.write(file, {"general.architecture": "qwen3moe"}, tensors), wanted


FORMATS = {
    ("BF16", False): "bf16",
    ("BF16", True): "bf16",
    ("F16", False): "f16",
    ("F16", True): "bf16",
    ("Q8_0", False): "q8_0",
    ("Q8_0", True): "bf16",
}


@pytest.mark.parametrize("method", ["BF16", "GGUF"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("form", ["separate", "fused", "single"])
@pytest.mark.parametrize("kind", ["BF16", "F16", "Q8_0"])
def test_weights_are_stored_numbers_times_their_scale(plain, stock, tmp_path, kind, form, scaled, method):
    file, wanted = write(tmp_path / "m.gguf", stock, kind, form, scaled=scaled)
    model = kt_sft.load_model(plain, KTConfig(threads=1, method=method, weight_path=str(file)))
    for (_, experts), want in zip(iter_routed_experts(model), wanted.values(), strict=True):
        assert set(experts.formats) == {FORMATS[kind, scaled] if method == "GGUF" else "bf16"}
        for expert in range(EXPERTS):
            held = experts.unpack_expert(expert)
            for side, mine, origin in zip(SIDES, held, experts.origin(expert)(), strict=True):
                assert torch.equal(mine, want[side][expert]) and torch.equal(origin, mine), (side, expert)


def test_logits_are_those_of_the_stock_model(plain, stock, tmp_path):
    """Activations are rounded to bf16, int8 weights to 8 bits; that may decide a token's routing."""
    ids = tiny_models.token_ids()
    for form, method in (("separate", "BF16"), ("fused", "GGUF"), ("fused", "INT8")):
        file, wanted = write(tmp_path / "m.gguf", stock, "BF16", form, scaled=True)
        truth = tiny_models.load_stock(plain)
        for name, module in truth.named_modules():
            if name.endswith("mlp.experts"):
                sides = wanted[int(name.split(".")[2])]
                with torch.no_grad():
                    module.gate_up_proj.copy_(torch.cat([sides["gate"], sides["up"]], dim=1))
                    module.down_proj.copy_(sides["down"])
        config = KTConfig(threads=1, method=method, weight_path=str(file))
        got = kt_sft.load_model(plain, config, dtype=torch.float32).eval()(ids).logits.detach()
        want = truth(ids).logits.detach()
        errors = (got - want).norm(dim=-1) / want.norm(dim=-1)
        assert errors.median() < (0.03 if method == "INT8" else 0.01)


@pytest.mark.parametrize("form", ["fused", "single"])
def test_one_layer_as_an_operator(stock, tmp_path, form):
    file, wanted = write(tmp_path / "m.gguf", stock, "Q8_0", form, scaled=True)
    layer = min(stock)
    sizes = {"num_experts": EXPERTS, "hidden_size": 64, "moe_intermediate_size": 96, "num_experts_per_tok": 2}
    moe = KTMoEWrapper(layer, **sizes, cpuinfer_threads=1, weight_path=str(file), method="GGUF")
    moe.load_weights()
    for expert in range(EXPERTS):
        for side, mine in zip(SIDES, moe._experts.unpack_expert(expert), strict=True):
            assert torch.equal(mine, wanted[layer][side][expert])


def refused(plain, file, match, error=FormatError):
    with pytest.raises(error, match=match) as caught:
        kt_sft.load_model(plain, KTConfig(threads=1, weight_path=str(file)))
    assert "\n" not in str(caught.value)


def test_what_is_not_known_is_refused_by_name(plain, stock, tmp_path):
    file, _ = write(tmp_path / "m.gguf", stock, "BF16", "separate", scaled=True)
    metadata, tensors = contents(file)
    ones = gguf_files.encode(torch.ones(EXPERTS).numpy(), "F32")
    row = gguf_files.encode(torch.ones(EXPERTS, 64).numpy(), "F32")

    def beside(match, error=FormatError, without=(), **more):
        kept = {name: value for name, value in tensors.items() if name not in without}
        gguf_files.write(file, metadata, kept | {name.replace("__", "."): value for name, value in more.items()})
        refused(plain, file, match, error)

    beside("tensor blk.1.ffn_up_exps.weight_scale_2: .* not known", UnsupportedModel, **{
        "blk.1.ffn_up_exps.weight_scale_2": ones})  # fmt: skip
    beside("tensor blk.1.ffn_up_exps.weight.scale: .* not known", UnsupportedModel, **{
        "blk.1.ffn_up_exps.weight.scale": ones})  # fmt: skip
    beside("tensor blk.0.ffn_norm_exps.weight: .* not known", UnsupportedModel, **{"blk.0.ffn_norm_exps.weight": ones})
    beside("tensor blk.0.ffn_gate_exps.bias: .* found a bias", UnsupportedModel, **{"blk.0.ffn_gate_exps.bias": row})
    beside(r"tensor blk.0.ffn_up_exps.scale: expected shape \[6\], found \[6, 64\]", **{"blk.0.ffn_up_exps.scale": row})
    nan = gguf_files.encode(torch.tensor([1.0, 1.0, float("nan"), 1.0, 1.0, 1.0]).numpy(), "F32")
    beside("tensor blk.0.ffn_up_exps.scale: expected finite numbers, found nan for expert 2", **{
        "blk.0.ffn_up_exps.scale": nan})  # fmt: skip
    both = gguf_files.encode(torch.ones(EXPERTS, 192, 64).numpy(), "BF16")
    beside("ffn_gate_up_exps.weight: expected one form of it, found blk.1.ffn_gate_exps.weight, too", **{
        "blk.1.ffn_gate_up_exps.weight": both})  # fmt: skip
    one = gguf_files.encode(torch.ones(96, 64).numpy(), "BF16")
    beside("ffn_gate_exps.weight: expected one form of it, found blk.1.ffn_gate.3.weight, too", **{
        "blk.1.ffn_gate.3.weight": one})  # fmt: skip
    beside("tensor blk.1.ffn_gate.6.weight: expected 6 experts, found one more", **{"blk.1.ffn_gate.6.weight": one})
    beside("blk.1.ffn_gate_up_exps.scale: expected its weight .*, found no such tensor", **{
        "blk.1.ffn_gate_up_exps.scale": ones})  # fmt: skip


def test_scales_of_activations_change_nothing_and_are_named(plain, stock, tmp_path, caplog):
    file, wanted = write(tmp_path / "m.gguf", stock, "BF16", "separate", scaled=True)
    metadata, tensors = contents(file)
    inputs = {name.replace(".scale", ".input_scale"): value for name, value in tensors.items() if "scale" in name}
    gguf_files.write(file, metadata, tensors | inputs)
    with caplog.at_level(logging.WARNING, logger="kt_sft"):
        model = kt_sft.load_model(plain, KTConfig(threads=1, weight_path=str(file)))
    (said,) = [r.message for r in caplog.records if "input_scale" in r.message]
    assert f"{len(inputs)} tensors such as blk.0.ffn_down_exps.input_scale" in said
    _, experts = next(iter(iter_routed_experts(model)))
    assert torch.equal(experts.unpack_expert(3)[2], wanted[0]["down"][3])


def test_scale_of_up_is_that_of_both_halves(plain, stock, tmp_path):
    """So llama.cpp computes a fused gate_up whose scale is named after up."""
    file, wanted = write(tmp_path / "m.gguf", stock, "BF16", "fused", scaled=True)
    metadata, tensors = contents(file)
    renamed = {name.replace("gate_up_exps.scale", "up_exps.scale"): value for name, value in tensors.items()}
    gguf_files.write(file, metadata, renamed)
    model = kt_sft.load_model(plain, KTConfig(threads=1, weight_path=str(file)))
    _, experts = next(iter(iter_routed_experts(model)))
    for side, mine in zip(SIDES, experts.unpack_expert(2), strict=True):
        assert torch.equal(mine, wanted[0][side][2])


def test_gemma_4_has_its_routers_scale_beside_down(tmp_path):
    """It is in the model directory as well and is multiplied once."""
    plain = tiny_models.build("gemma4_text", tmp_path / "plain")
    stock = tiny_models.load_stock(plain)
    routers = [module for module in stock.modules() if hasattr(module, "per_expert_scale")]
    assert routers
    for number, router in enumerate(routers):
        with torch.no_grad():
            scale = torch.linspace(0.5, 1.7, len(router.per_expert_scale)) + number / 10
            router.per_expert_scale.copy_(scale.bfloat16())

    def change(stored):
        for name, parameter in stock.named_parameters():
            keys = [key for key in stored if key.endswith(name.partition("layers.")[2]) and "per_expert_scale" in name]
            stored.update({key: parameter.detach().to(stored[key].dtype) for key in keys})
        return stored

    tiny_models.rewrite(plain, change)
    tensors = {}
    for name, module in stock.named_modules():
        if hasattr(module, "gate_up_proj") and module.gate_up_proj.dim() == 3:
            block = f"blk.{name.split('layers.')[1].split('.')[0]}.ffn_"
            router = stock.get_submodule(name.rpartition(".")[0] + ".router")
            tensors[block + "gate_up_exps.weight"] = gguf_files.encode(module.gate_up_proj.detach().numpy(), "BF16")
            tensors[block + "down_exps.weight"] = gguf_files.encode(module.down_proj.detach().numpy(), "BF16")
            scale = router.per_expert_scale.detach().numpy()
            tensors[block + "down_exps.scale"] = gguf_files.encode(scale, "F32")
    file = gguf_files.write(tmp_path / "m.gguf", {"general.architecture": "gemma4"}, tensors)
    ids = tiny_models.token_ids()
    ours = kt_sft.load_model(plain, KTConfig(threads=1, weight_path=str(file)), dtype=torch.float32).eval()
    want = tiny_models.load_stock(plain)(ids).logits.detach()
    assert (ours(ids).logits.detach() - want).norm() / want.norm() < 0.01
    up = {name.replace("down_exps.scale", "gate_up_exps.scale"): v for name, v in tensors.items() if "scale" in name}
    gguf_files.write(file, {"general.architecture": "gemma4"}, tensors | up)
    refused(plain, file, "down_exps.scale: expected the router's scale of each expert alone", UnsupportedModel)


@pytest.mark.parametrize("split_kv_b", [False, True])
def test_whole_model_with_scales(tmp_path, monkeypatch, split_kv_b, caplog):
    """Of attention, shared experts and the head, one number each; of routed experts one per expert."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    plain = tiny_models.build("deepseek_v3", tmp_path / "plain")
    file = gguf_models.write_model(plain, tmp_path / "m.gguf", split_kv_b=split_kv_b)
    metadata, tensors = contents(file)
    scaled, inputs = {}, {}
    for name, (kind, shape, data) in tensors.items():
        if kind == "BF16" and len(shape) > 1:  # powers of two leave bf16 as it is
            values = numbers((kind, shape, data))
            count = shape[0] if "_exps" in name else 1
            scale = torch.tensor([2.0 ** (-1 - e % 3) for e in range(count)])
            stored = values / scale.view(-1, *[1] * (len(shape) - 1))
            base = name.removesuffix(".weight")
            scaled[name] = gguf_files.encode(stored.numpy(), "BF16")
            scaled[f"{base}.scale"] = gguf_files.encode(scale.numpy(), "F32")
            inputs[f"{base}.input_scale"] = gguf_files.encode((scale * 3).numpy(), "F32")
    assert {name.split(".")[-2] for name in scaled} >= {"output", "attn_output", "ffn_up_shexp", "ffn_up_exps"}
    gguf_files.write(file, metadata, tensors | scaled | inputs)
    with caplog.at_level(logging.WARNING, logger="kt_sft"):
        ours = kt_sft.load_model(file)
    assert sum("input_scale" in record.message for record in caplog.records) == 2
    wanted = kt_sft.load_model(plain)
    parameters = dict(wanted.named_parameters())
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in ours.named_parameters())
    ids = tiny_models.token_ids()
    assert torch.equal(ours(ids).logits, wanted(ids).logits)
    wrong = {"blk.0.attn_output.scale": gguf_files.encode(torch.ones(7).numpy(), "F32")}
    gguf_files.write(file, metadata, tensors | scaled | wrong)
    with pytest.raises(UnsupportedModel, match="tensor blk.0.attn_output.scale: .* the GGUF file as kt_weight_path"):
        kt_sft.load_model(file)


def test_whole_model_with_gate_and_up_in_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    plain = tiny_models.build("qwen3_moe", tmp_path / "plain")
    file = gguf_models.write_model(plain, tmp_path / "m.gguf")
    metadata, tensors = contents(file)
    for name in [name for name in tensors if "gate_exps" in name]:
        kind, shape, gate = tensors.pop(name)
        _, _, up = tensors.pop(name.replace("gate", "up"))
        both = torch.cat([torch.from_numpy(data.reshape(shape[0], -1)) for data in (gate, up)], dim=1)
        tensors[name.replace("gate", "gate_up")] = (kind, (shape[0], 2 * shape[1], shape[2]), both.numpy().reshape(-1))
    gguf_files.write(file, metadata, tensors)
    ids = tiny_models.token_ids()
    assert torch.equal(kt_sft.load_model(file)(ids).logits, kt_sft.load_model(plain)(ids).logits)
