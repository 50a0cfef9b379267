"""`KTMoEWrapper` on files: it must compute bit by bit what the loaded model's experts compute from the same files."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time

import pytest
import torch

import kt_sft
from kt_sft.convert import run
from kt_sft.errors import ConfigError, FormatError, KTError, UnsupportedModel
from kt_sft.formats.packed import PackedContainer
from kt_sft.integrations.transformers.converting import convert_checkpoint
from kt_sft.sources.safetensors import SafetensorsExperts
from tests.helpers import gguf_models, quantized_checkpoints, tiny_models
from tests.helpers.operators import inputs_of, loaded, operator_of, problem_of, weights_of

LAYER = 1


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One tiny model in every stored form."""
    root = tmp_path_factory.mktemp("files")
    model = tiny_models.build("qwen3_moe", root / "model", hidden_size=64, moe_intermediate_size=32)
    (int4, _) = quantized_checkpoints.int4_checkpoint(model, root / "int4")
    return {
        "model": model,
        "int4": int4,
        "gguf": gguf_models.write_model(model, root / "model.gguf", kind="Q8_0"),
        "packed": convert(model, root / "packed", "INT8"),
        "packed_int4": convert(model, root / "packed_int4", "INT4", int4_group_size=64),
    }


def convert(model, output, method, **config):
    def silent(what, total):
        return contextlib.nullcontext(lambda done, total, layer: None)

    convert_checkpoint(model, output, kt_sft.KTConfig(method=method, **config), bar=silent)
    return output


CASES = [
    ("model", "AMXBF16", "model", {}),
    ("model", "AMXINT8", "model", {}),
    ("model", "AMXINT4", "model", {}),
    ("int4", "RAWINT4", "int4", {}),
    ("gguf", "LLAMAFILE", "model", {}),
    ("gguf", "AMXINT8", "model", {}),
    ("packed", "AMXINT8", "model", {}),
    ("packed_int4", "AMXINT4", "model", {"int4_group_size": 64}),
]


@pytest.mark.parametrize(("source", "method", "model", "settings"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_every_stored_form_gives_what_the_model_computes(files, source, method, model, settings):
    config = kt_sft.KTConfig(method=method, weight_path=str(files[source]), **settings)
    experts = kt_sft.load_model(files[model], config, dtype=torch.bfloat16).eval().model.layers[LAYER].mlp.experts
    count, hidden, inter = experts.num_experts, experts.hidden_dim, experts.intermediate_dim
    whole = kt_sft.KTMoEWrapper(LAYER, count, 2, hidden, inter, weight_path=str(files[source]), method=method)
    whole.load_weights()
    physical = torch.tensor([count - 1, *range(count)])
    copies = kt_sft.KTMoEWrapper(
        LAYER, count + 1, 2, hidden, inter, weight_path=files[source], method=method, num_gpu_experts=2
    )
    copies.load_weights(physical)
    x, weights = torch.randn(7, hidden).bfloat16(), torch.rand(7, 2)
    ids = torch.randint(0, count + 1, (7, 2))
    with torch.no_grad():
        want = experts(x, physical[ids], weights)
        assert torch.equal(whole.forward(x, physical[ids], weights), want)
        want = experts(x, physical[ids].masked_fill(ids < 2, count), weights)
        assert torch.equal(copies.forward(x, ids, weights), want)


@pytest.mark.parametrize(
    ("source", "method", "sizes", "error"),
    [
        ("model", "LLAMAFILE", {}, "method GGUF: expected the experts in a GGUF file"),
        ("model", "RAWINT4", {}, "method RAWINT4: expected a compressed-tensors"),
        ("packed", "AMXBF16", {}, "holds int8"),
        ("model", "AMXBF16", {"layer_idx": 9}, "experts of layer 9"),
        ("packed", "AMXINT8", {"layer_idx": 9}, "experts of layer 9"),
        ("gguf", "LLAMAFILE", {"layer_idx": 9}, "blk.9"),
        ("model", "AMXBF16", {"inter": 33}, "moe_intermediate_size 33"),
        ("gguf", "LLAMAFILE", {"inter": 33}, "ffn_gate_exps"),
    ],
)
def test_files_that_do_not_fit_are_refused(files, source, method, sizes, error):
    sizes = {"layer_idx": LAYER, "inter": 32, **sizes}
    count = tiny_models.config("qwen3_moe").num_experts
    wrapper = kt_sft.KTMoEWrapper(
        sizes["layer_idx"], count, 2, 64, sizes["inter"], weight_path=files[source], method=method
    )
    with pytest.raises(KTError, match=re.escape(error)):
        wrapper.load_weights()


@pytest.mark.parametrize(("stored", "found"), [("checkpoint", "found biases"), ("container", "found clamped_swiglu")])
def test_experts_with_biases_are_refused(tmp_path, stored, found):
    path = tiny_models.build("gpt_oss", tmp_path / "model")
    if stored == "container":
        path = convert(path, tmp_path / "packed", "BF16")
    sizes = tiny_models.config("gpt_oss")
    count, hidden, inter = sizes.num_local_experts, sizes.hidden_size, sizes.intermediate_size
    with pytest.raises(UnsupportedModel, match=found):
        kt_sft.KTMoEWrapper(LAYER, count, 2, hidden, inter, weight_path=str(path)).load_weights()


def test_layers_of_one_model_are_read_one_after_another(files, monkeypatch):
    """They share the open files, which the end of each load closes, also of one that failed."""
    events, stock_load, stock_close = [], SafetensorsExperts.load, SafetensorsExperts.close

    def load(self, experts, name, expert, **arguments):
        events.append(name)
        time.sleep(0.002)
        if expert == 2 and name.startswith("model.layers.1."):
            raise ValueError("planted")
        stock_load(self, experts, name, expert, **arguments)

    def close(self):
        events.append("close")
        stock_close(self)

    monkeypatch.setattr(SafetensorsExperts, "load", load)
    monkeypatch.setattr(SafetensorsExperts, "close", close)
    count = tiny_models.config("qwen3_moe").num_experts
    layers = [kt_sft.KTMoEWrapper(i, count, 2, 64, 32, weight_path=files["model"]) for i in (0, 1)]

    def load_quietly(layer):
        with contextlib.suppress(FormatError):
            layer.load_weights()

    threads = [threading.Thread(target=load_quietly, args=(layer,)) for layer in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = (f"model.layers.{i}.mlp.experts" for i in (0, 1))
    runs = [first] * count, [second] * 3
    in_turn = [name for name in events if name != "close"]
    assert in_turn in ([*runs[0], *runs[1]], [*runs[1], *runs[0]])
    assert events[-1] == "close" and "close" in events[: len(in_turn)]


def test_another_number_of_experts_needs_a_map(files):
    wrapper = kt_sft.KTMoEWrapper(LAYER, 4, 2, 64, 32, weight_path=files["model"])
    with pytest.raises(ValueError, match="expected 4 experts"):
        wrapper.load_weights()


@pytest.mark.parametrize("method", ["AMXBF16", "AMXINT8", "AMXINT4"])
def test_saved_layers_are_a_container_that_gives_the_same(method, tmp_path):
    problem = problem_of("AMXBF16")
    path = str(tmp_path / "packed")
    saved = [loaded(problem, method, layer_idx=i, weight_path=path, cpu_save=True, num_gpu_experts=i) for i in (3, 1)]
    again = [operator_of(problem, method, layer_idx=i, weight_path=path, num_gpu_experts=i) for i in (3, 1)]
    for before, after in zip(saved, again, strict=True):
        after.load_weights()
        assert torch.equal(after.forward(*inputs_of(problem)), before.forward(*inputs_of(problem)))
    with PackedContainer(path) as container:
        assert [number for _, number in container.check_blobs()] == [*range(5)] * 2
        assert list(container.manifest.layers) == [f"model.layers.{i}.mlp.experts" for i in (1, 3)]


def test_a_container_of_something_else_is_not_written_to(files, tmp_path):
    problem = problem_of("AMXBF16")
    path = str(tmp_path / "packed")
    loaded(problem, "AMXINT8", weight_path=path, cpu_save=True)
    for where, method, found in ((path, "AMXINT4", "found int8"), (files["packed"], "AMXINT8", "from a checkpoint")):
        with pytest.raises(ConfigError, match=found):
            loaded(problem, method, weight_path=str(where), cpu_save=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(OSError, match=r"notes\.txt"):
        loaded(problem, "AMXINT8", weight_path=str(tmp_path / "other"), cpu_save=True)


def test_a_layer_that_is_saved_again_takes_the_place_of_the_first(tmp_path):
    path = str(tmp_path / "packed")
    for seed in (0, 1):
        loaded(problem_of("AMXBF16", seed=seed), weight_path=path, cpu_save=True)
    problem = problem_of("AMXBF16", seed=1)
    wrapper = operator_of(problem, weight_path=path)
    wrapper.load_weights()
    assert torch.equal(wrapper.forward(*inputs_of(problem)), loaded(problem).forward(*inputs_of(problem)))


class Killed(BaseException):
    """What ends a process between two steps."""


@pytest.mark.parametrize("step", ["_publish", "replace"])
def test_a_stop_while_a_layer_is_saved_leaves_a_container_of_those_before(tmp_path, monkeypatch, step):
    """Before the manifest is written, and before it takes the place of the last one."""
    path, problems = str(tmp_path / "packed"), [problem_of("AMXBF16", seed=seed) for seed in (0, 1)]
    stock = os.replace

    def replace(part, name):
        if str(name).endswith("manifest.json"):
            raise Killed
        stock(part, name)

    def publish(folder, manifest):
        raise Killed

    def stop_while_saving(problem):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(*((os, "replace", replace) if step == "replace" else (run, "_publish", publish)))
            loaded(problem, weight_path=path, cpu_save=True)

    stop_while_saving(problems[1])
    loaded(problems[0], weight_path=path, cpu_save=True)
    stop_while_saving(problems[1])
    with PackedContainer(path) as container:
        assert len(list(container.check_blobs())) == 5
    again = operator_of(problems[0], weight_path=path)
    again.load_weights()
    inputs = inputs_of(problems[0])
    assert torch.equal(again.forward(*inputs), loaded(problems[0]).forward(*inputs))
    for _ in range(3):
        loaded(problems[1], weight_path=path, cpu_save=True)
    assert sum(file.startswith("layer-") for file in os.listdir(path)) == 1


@pytest.mark.parametrize(
    ("arguments", "act", "words"),
    [
        ({}, lambda w, t: w.load_weights(), "weight_path"),
        ({"weight_path": "x", "cpu_save": True}, lambda w, t: w.load_weights(), "cpu_save"),
        ({"method": "LLAMAFILE"}, lambda w, t: w.load_weights_from_tensors(*t), "method GGUF"),
        ({"method": "RAWINT4"}, lambda w, t: w.load_weights_from_tensors(*t), "method RAWINT4"),
        ({"weight_path": "nowhere"}, lambda w, t: w.load_weights(), "nowhere"),
    ],
)
def test_loading_that_cannot_work_is_refused(arguments, act, words):
    problem = problem_of("AMXBF16")
    wrapper = operator_of(problem, arguments.pop("method", "AMXBF16"), **arguments)
    with pytest.raises((ConfigError, FormatError), match=words):
        act(wrapper, weights_of(problem))


def test_tensors_of_a_wrong_shape_are_refused():
    problem = problem_of("AMXBF16")
    gate, up, down = weights_of(problem)
    with pytest.raises(ValueError, match="down_proj: expected floating point"):
        operator_of(problem).load_weights_from_tensors(gate, up, down.mT)
    with pytest.raises(ValueError, match="up_proj: expected floating point"):
        operator_of(problem).load_weights_from_tensors(gate, up.to(torch.int8), down)
    with pytest.raises(TypeError, match=r"gate_proj: expected a torch\.Tensor, found ndarray"):
        operator_of(problem).load_weights_from_tensors(gate.numpy(), up, down)


def test_files_that_were_written_anew_are_read_anew(tmp_path):
    """The checkpoint stays open for the layers of one model, and only while it is the same."""
    now, count = tmp_path / "now", tiny_models.config("qwen3_moe").num_experts
    arguments = torch.randn(3, 64), torch.randint(0, count, (3, 2)), torch.rand(3, 2)
    for seed in (0, 1):
        path = tiny_models.build("qwen3_moe", tmp_path / f"{seed}", seed=seed, hidden_size=64, moe_intermediate_size=32)
        shutil.copytree(path, now, dirs_exist_ok=True)
        both = [kt_sft.KTMoEWrapper(0, count, 2, 64, 32, weight_path=str(where)) for where in (now, path)]
        for wrapper in both:
            wrapper.load_weights()
        assert torch.equal(*(wrapper.forward(*arguments) for wrapper in both))
