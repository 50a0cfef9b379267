"""Adapters whose tensors are of the wrong kind, in the wrong place or no numbers: refused by the tensor's name at every
door, whatever file they are in."""

from __future__ import annotations

import io
import math
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import kt_sft
from kt_sft.adapters import forms, gguf
from kt_sft.formats import gguf_writer
from tests.helpers import adapters, ktransformers_adapters, tiny_models
from tests.helpers.adapter_doors import Doors
from tests.helpers.adapters import edit

PREFIX = "base_model.model."
LAYER = f"{PREFIX}model.layers.1."
Q_A, Q_B = (f"{LAYER}self_attn.q_proj.lora_{role}.weight" for role in "AB")
EXPERTS_A = f"{LAYER}mlp.experts.lora_A.weight"


@pytest.fixture(scope="module")
def doors(tmp_path_factory):
    return Doors(tmp_path_factory.mktemp("tensors"))


@pytest.fixture
def adapter(doors, tmp_path):
    return shutil.copytree(doors.adapter, tmp_path / "adapter")


def rewrite(folder: Path, change, name: str = "adapter_model.safetensors") -> None:
    file = folder / name
    tensors = load_file(file)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, {"format": "pt"})


def put(key, value):
    def change(tensors):
        tensors[key] = value(tensors[key]) if callable(value) else value

    return change


def drop(*keys):
    return lambda tensors: [tensors.pop(key) for key in keys]


def copy(source, target):
    return lambda tensors: tensors.update({target: tensors[source].clone()})


def pair(module):
    """Factors of a module that nobody targets, of the right shapes."""
    sizes = {"lora_A": (3, 48), "lora_B": (7, 3)}
    return lambda t: t.update({f"{PREFIX}{module}.{role}.weight": torch.ones(s) for role, s in sizes.items()})


def with_value(value, dtype=None):
    def change(tensor):
        tensor = tensor.to(dtype or tensor.dtype)
        tensor.view(-1)[5] = value
        return tensor

    return change


WRONG = {
    "lora_B missing": (drop(Q_B), "q_proj.lora_B.weight"),
    "lora_A missing": (drop(Q_A), "q_proj.lora_A.weight"),
    "lora_B of experts missing": (drop(EXPERTS_A.replace("_A", "_B")), "experts.lora_B.weight"),
    "no target": (pair("model.layers.1.mlp.gate"), "mlp.gate.lora_"),
    "no module": (pair("model.layers.1.nothing"), "nothing.lora_"),
    "other layer": (pair("model.layers.99999999999999999999.mlp.x"), "mlp.x.lora_"),
    "expert of its own": (copy(Q_A, f"{LAYER}mlp.experts.99999999999.gate_proj.lora_A.weight"), "experts.9999999"),
    "digits": (copy(Q_A, f"{LAYER}mlp.experts.{'9' * 900}.gate_proj.lora_A.weight"), "experts.9999999"),
    "other digits": (copy(Q_A, f"{LAYER}mlp.experts.\u0663.gate_proj.lora_A.weight"), "gate_proj.lora_A.weight"),
    "two names": (copy(Q_A, Q_A.removeprefix(PREFIX)), "which means the same"),
    "two names of PEFT": (copy(Q_A, Q_A.replace("lora_A.", "lora_A.default.")), "which means the same"),
    "name of control characters": (copy(Q_A, f"{LAYER}a\x00\x1b[31m\nb.lora_A.weight"), "\\x1b[31m\\nb.lora_A.weight"),
    "endless name": (copy(Q_A, f"{LAYER}{'layers.1.' * 9000}experts.x"), "expected a name, found 81"),
    "weight of the base": (lambda t: t.update({f"{LAYER}input_layernorm.weight": torch.ones(48)}), "input_layernorm"),
    "DoRA": (lambda t: t.update({f"{LAYER}self_attn.q_proj.lora_magnitude_vector": torch.ones(64)}), "magnitude"),
    "lora_bias": (lambda t: t.update({f"{LAYER}self_attn.q_proj.lora_B.bias": torch.ones(64)}), "lora_B.bias"),
    "rank 0": (put(Q_A, torch.ones(())), "q_proj.lora_A.weight"),
    "rank 0 of experts": (put(EXPERTS_A, torch.ones(())), "experts.lora_A.weight"),
    "empty": (put(Q_A, torch.ones(0, 48)), "q_proj.lora_A.weight"),
    "empty of experts": (put(EXPERTS_A, torch.ones(0, 48)), "experts.lora_A.weight"),
    "transposed": (put(Q_A, lambda t: t.T), "q_proj.lora_A.weight"),
    "three axes": (put(EXPERTS_A, lambda t: t.unflatten(0, (7, 3))), "experts.lora_A.weight"),
    "other rank": (put(Q_A, torch.ones(4, 48)), "q_proj.lora_A.weight"),
    **{
        f"{value} in {dtype}, {key.split('.')[-3]}": (put(key, with_value(value, dtype)), f"{key}: expected finite")
        for key in (Q_A, EXPERTS_A)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        for value in (math.nan, math.inf, -math.inf)
    },
    "no f32": (put(Q_A, with_value(1e300, torch.float64)), "q_proj.lora_A.weight"),
    "NaN in fp8": (put(Q_A, lambda t: with_value(math.nan)(t).to(torch.float8_e4m3fn)), "q_proj.lora_A.weight"),
    **{
        f"{dtype}, {key.split('.')[-3]}": (put(key, lambda t, dtype=dtype: t.to(dtype)), f"{key}: element type")
        for key in (Q_A, EXPERTS_A)
        for dtype in (torch.int32, torch.int64, torch.uint8, torch.int8, torch.bool, torch.complex64, torch.uint16)
    },
}
# What takes each of PEFT's, the converters' and the report's own way through a file.
EVERYWHERE = ("lora_B missing", "no target", "two names", "weight of the base", "nan in torch.bfloat16, experts")
EVERYWHERE += ("torch.int32, q_proj", "name of control characters", "other rank", "digits")
assert set(EVERYWHERE) <= set(WRONG)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tensors_are_refused(doors, adapter, name):
    change, words = WRONG[name]
    rewrite(adapter, change)
    doors.refuse(adapter, words, is_quick=name not in EVERYWHERE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_other_floats_are_taken_as_numbers(doors, adapter, dtype):
    rewrite(adapter, lambda t: t.update({key: (8 * tensor).round().to(dtype) for key, tensor in t.items()}))
    wanted = {key: tensor.float() for key, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    loaded = kt_sft.load_adapter(doors.model, adapter, low_cpu_mem_usage=True)
    found = {n.replace(".default", ""): p.detach() for n, p in loaded.named_parameters() if ".lora_" in n}
    loaded.unload()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key].float(), wanted[key]) for key in wanted)
    lora = forms.open_adapter(adapter, doors.described).read_linear("model.layers.1.self_attn.q_proj")
    assert torch.equal(lora.a.float(), wanted[Q_A])


class _Sub(torch.Tensor):
    pass


def pickled(value):
    """A .bin with one more entry."""
    return lambda t: t.update({Q_A: value})


PICKLES = {
    "an int key": (lambda t: t.update({3: torch.ones(2)}), "found 3 as a name"),
    "no tensor": (pickled([1, 2]), "q_proj.lora_A.weight: expected a dense tensor, found list"),
    "text": (pickled("text"), "q_proj.lora_A.weight: expected a dense tensor, found str"),
    "a dict": (pickled({"a": torch.ones(2)}), "q_proj.lora_A.weight: expected a dense tensor, found dict"),
    "sparse": (pickled(torch.eye(3).to_sparse()), "q_proj.lora_A.weight: expected a dense tensor, found torch"),
    "meta": (pickled(torch.ones(3, 48, device="meta")), "q_proj.lora_A.weight: expected a dense tensor, found torch"),
    "quantised": (
        pickled(torch.quantize_per_tensor(torch.ones(3, 48), 0.1, 0, torch.qint8)),
        "q_proj.lora_A.weight: expected a dense tensor, found torch",
    ),
    "integers": (pickled(torch.ones(3, 48, dtype=torch.int32)), "q_proj.lora_A.weight: element type"),
    "bool": (pickled(torch.ones(3, 48, dtype=torch.bool)), "q_proj.lora_A.weight: element type"),
    "complex": (pickled(torch.ones(3, 48, dtype=torch.complex64)), "q_proj.lora_A.weight: expected a dense tensor"),
    "NaN": (pickled(torch.full((3, 48), math.nan, dtype=torch.bfloat16)), "q_proj.lora_A.weight: expected finite"),
    "one element for all": (pickled(torch.ones(1, 1).expand(3, 48)), "q_proj.lora_A.weight: expected a dense tensor"),
    "a class of another": (pickled(torch.ones(3, 48).as_subclass(_Sub)), "q_proj.lora_A.weight: expected a dense"),
    "a list": (lambda t: [1, 2], "expected tensors by name, found list"),
    "lora_B missing": (lambda t: t.pop(Q_B), "q_proj.lora_B.weight"),
}


def as_pickle(folder: Path, change) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    changed = change(tensors)
    torch.save(changed if isinstance(changed, list) else tensors, folder / "adapter_model.bin")
    return folder / "adapter_model.bin"


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("name", PICKLES)
def test_wrong_values_in_a_pickle(doors, adapter, name):
    change, words = PICKLES[name]
    as_pickle(adapter, change)
    doors.refuse(adapter, words, is_quick=name != "an int key")


def test_a_pickle_of_views_and_parameters_is_taken(doors, adapter):
    def change(tensors):
        tensors[Q_A] = torch.nn.Parameter(tensors[Q_A].T.contiguous()).T
        tensors[Q_B] = torch.nn.Parameter(tensors[Q_B])

    as_pickle(adapter, change)
    doors.take(adapter)


class _Runs:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def program(body: bytes):
    return lambda name, data: body if name.endswith("data.pkl") else data


def doubled_key() -> bytes:
    """A dict with a key that takes 2^40 steps to hash."""
    key: tuple = ("x",)
    for _ in range(40):
        key = (key, key)
    stream = io.BytesIO()
    pickle.Pickler(stream, protocol=2).dump(key)
    return b"\x80\x02}" + stream.getvalue()[2:-1] + b"Ns."


def bytes_of(value) -> bytes:
    return pickle.dumps(value, protocol=2)


class _Huge:
    def __reduce__(self):
        return bytearray, (1 << 40,)


ARCHIVES = {
    "code": (lambda mark: program(bytes_of({"a": _Runs(mark)})), zipfile.ZIP_STORED, "found io.open"),
    "a byte array": (lambda _: program(bytes_of({"a": _Huge()})), zipfile.ZIP_STORED, "bytearray"),
    "an endless hash": (lambda _: program(doubled_key()), zipfile.ZIP_STORED, "the instruction BINGET"),
    "another protocol": (lambda _: program(pickle.dumps({"a": 1}, protocol=4)), zipfile.ZIP_STORED, "FRAME"),
    "cut off": (lambda _: program(b"\x80\x02}q"), zipfile.ZIP_STORED, "damaged"),
    "compressed": (lambda _: lambda name, data: data, zipfile.ZIP_DEFLATED, "found compressed ones"),
    "no program": (lambda _: lambda name, data: None if "pkl" in name else data, zipfile.ZIP_STORED, "record data.pkl"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_pickles_run_nothing_and_ask_for_nothing(doors, adapter, tmp_path, name):
    made, method, words = ARCHIVES[name]
    mark = tmp_path / "ran"
    change = made(mark)
    file = as_pickle(adapter, lambda tensors: None)
    with zipfile.ZipFile(file) as archive:
        records = {each.filename: change(each.filename, archive.read(each)) for each in archive.infolist()}
    with zipfile.ZipFile(file, "w", method) as archive:
        for record, data in records.items():
            if data is not None:
                archive.writestr(record, data)
    doors.refuse(adapter, words, is_quick=name != "code")
    assert not mark.exists()


@pytest.mark.parametrize("raw", [b"", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(99), pickle.dumps({"a": 1})])
def test_files_that_are_no_archive(doors, adapter, raw):
    as_pickle(adapter, lambda tensors: None).write_bytes(raw)
    doors.refuse(adapter, "adapter_model.bin: damaged", is_quick=True)


@pytest.mark.parametrize("form", ["vllm", "gguf"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_numbers_in_other_forms(doors, tmp_path, form, value):
    folder = adapters.convert(doors.root, form, tmp_path / form)
    if form == "gguf":
        raw = bytearray(folder.read_bytes())
        raw[-4:] = torch.tensor([value]).numpy().tobytes()
        folder.write_bytes(bytes(raw))
        words = "lora_b: expected finite numbers"
    else:
        key = next(key for key in load_file(folder / "adapter_model.safetensors") if "experts.2.up_proj" in key)
        rewrite(folder, put(key, with_value(value, torch.bfloat16)))
        words = f"{key}: expected finite numbers"
    doors.refuse(folder, words)


def test_two_spellings_of_one_expert(doors, tmp_path):
    folder = adapters.convert(doors.root, "vllm", tmp_path / "adapter")
    key = next(key for key in load_file(folder / "adapter_model.safetensors") if "experts.2.up_proj.lora_A" in key)
    for old, new in ((".2.up_proj", ".02.up_proj"), (".2.up_proj", ".2.w3")):
        again = shutil.copytree(folder, tmp_path / new)
        rewrite(again, copy(key, key.replace(old, new)))
        rewrite(again, copy(key.replace("lora_A", "lora_B"), key.replace(old, new).replace("lora_A", "lora_B")))
        doors.refuse(again, "which is the same matrix", is_quick=True)


def test_a_tensor_in_two_files(doors, adapter):
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    doors.refuse(adapter, "adapter_model.bin, which nothing here reads", is_quick=True)


def test_a_target_that_is_named_twice(doors, adapter):
    """PEFT finds out when half of its modules are in the model."""
    edit(adapter, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.q_proj.weight"])
    doors.refuse(adapter, "q_proj.lora_A.weight: expected a target that is named once", is_quick=True)


def test_layers_that_the_config_leaves_out_are_no_targets(doors, adapter):
    edit(adapter, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], layers_to_transform=[0])
    doors.refuse(adapter, "layers.1.", is_quick=True)
    edit(adapter, layers_to_transform=None, exclude_modules=["layers.1.self_attn.q_proj"])
    doors.refuse(adapter, "layers.1.self_attn.q_proj.lora_A.weight", is_quick=True)
    edit(adapter, exclude_modules=None)
    doors.take(adapter)


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"])
def test_each_module_that_is_named_as_saved_is_there(doors, tmp_path, missing):
    folder = tmp_path / "adapter"
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm", "lm_head"], task_type="CAUSAL_LM")
    get_peft_model(tiny_models.load_stock(doors.base), config).save_pretrained(folder)
    doors.take(folder)
    rewrite(folder, drop(f"{PREFIX}{missing}"))
    doors.refuse(folder, missing, is_quick=True)


KT_A = "layers.1.experts.up_lora_a"
KT_WRONG = {
    "NaN": (put(KT_A, with_value(math.nan, torch.bfloat16)), f"{KT_A}: expected finite numbers"),
    "infinity": (put(KT_A.replace("_a", "_b"), with_value(math.inf, torch.float16)), "up_lora_b: expected finite"),
    "integers": (put(KT_A, lambda t: t.to(torch.int8)), f"{KT_A}: element type"),
    "no b": (drop("layers.1.experts.up_lora_b"), "layers.1.experts.up_lora_b: expected present, found missing"),
    "rank 0": (put(KT_A, torch.ones(())), KT_A),
    "no layer": (copy(KT_A, "layers.99999999999999999999.experts.up_lora_a"), "layers.99999999999999999999"),
    "far layer": (copy(KT_A, "layers.7.experts.up_lora_a"), "layers.7.experts.up_lora_a"),
    "other digits": (copy(KT_A, "layers.\u0661.experts.up_lora_a"), "experts.up_lora_a"),
    "two names": (copy(KT_A, f"model.{KT_A}"), f"{KT_A}, too"),
    "other name": (copy(KT_A, "x"), "tensor x"),
}


@pytest.mark.parametrize("name", KT_WRONG)
def test_wrong_factors_of_ktransformers(doors, adapter, name):
    change, words = KT_WRONG[name]
    rewrite(adapter, lambda t: [t.pop(key) for key in list(t) if ".experts." in key])
    edit(adapter, target_parameters=None)
    save_file(ktransformers_adapters.factors(doors.described, 3), adapter / ktransformers_adapters.NAME)
    forms.open_adapter(adapter, doors.described)
    rewrite(adapter, change, ktransformers_adapters.NAME)
    doors.refuse(adapter, words, is_quick=name != "NaN")


@pytest.mark.parametrize("key", ["general.type", "adapter.type", "general.architecture"])
def test_lists_where_a_gguf_file_has_texts(doors, tmp_path, key):
    metadata, plan, pieces = gguf.write(forms.open_adapter(doors.adapter, doors.described))
    gguf_writer.write(tmp_path / "a.gguf", metadata | {key: ["lora", "adapter"]}, plan, pieces)
    doors.refuse(tmp_path / "a.gguf", f"metadata {key}: expected a text", is_quick=True)


def test_a_gguf_file_without_a_tensor(doors, tmp_path):
    metadata, _, _ = gguf.write(forms.open_adapter(doors.adapter, doors.described))
    gguf_writer.write(tmp_path / "a.gguf", metadata, [], iter(()))
    doors.refuse(tmp_path / "a.gguf", "tensors: expected LoRA pairs, found none", is_quick=True)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, 1e30, "3", True, [1.0]])
def test_absurd_alpha_of_a_gguf_file(doors, tmp_path, alpha):
    metadata, plan, pieces = gguf.write(forms.open_adapter(doors.adapter, doors.described))
    gguf_writer.write(tmp_path / "a.gguf", metadata | {gguf.ALPHA_KEY: alpha}, plan, pieces)
    doors.refuse(tmp_path / "a.gguf", "metadata adapter.lora.alpha: expected a number up to 1000000", is_quick=True)
