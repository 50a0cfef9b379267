"""adapter_config.json with values that it cannot have: refused in one line at every door, before PEFT acts on it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time

import pytest

from kt_sft.errors import FormatError
from kt_sft.integrations import peft as kt_peft
from kt_sft.integrations.peft import adapter_dir
from tests.helpers import parity
from tests.helpers.adapter_doors import Doors
from tests.helpers.adapters import damaged, edit

CODE = {"megatron_config": {"a": 1}, "megatron_core": "planted_module"}
REFUSED = [
    (CODE, "megatron_config"),
    ({"megatron_config": {}, "megatron_core": "planted_module"}, "megatron_core"),
    ({"auto_mapping": {"base_model_class": "X", "parent_library": "planted_module"}}, "auto_mapping"),
    ({"auto_mapping": {"base_model_class": "os.system", "parent_library": "transformers"}}, "auto_mapping"),
    ({"auto_mapping": "planted_module"}, "auto_mapping"),
    ({"base_model_class": "X"}, "base_model_class"),
    ({"parent_library": "planted_module"}, "parent_library"),
    ({"_custom_modules": {"torch.nn.Linear": "planted_module.X"}}, "_custom_modules"),
    ({"runtime_config": {"ephemeral_gpu_offload": True}}, "runtime_config"),
    ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
    ({"corda_config": {"cache_file": "/etc/passwd"}}, "corda_config"),
    ({"eva_config": {"rho": 2.0}}, "eva_config"),
    ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"use_qalora": True}, "use_qalora"),
    ({"qalora_group_size": "x"}, "qalora_group_size"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"lora_ga_config": {"direction": "ArB2r"}}, "lora_ga_config"),
    ({"some_later_key": 7}, "some_later_key"),
    *(({key: "no"}, key) for key in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying", "inference_mode")),
    ({"use_rslora": 1}, "use_rslora: expected true or false, found 1"),
    ({"use_rslora": None}, "use_rslora"),
    *(({"r": value}, "r: expected a positive number") for value in (0, -1, 3.0, "3", True, None, 1 << 40, [3])),
    *(
        ({"lora_alpha": value}, "lora_alpha: expected a positive number")
        for value in (0, -5, 1e30, 1e-30, "5", True, None, 10**400, [5])
    ),
    *(({"lora_dropout": value}, "lora_dropout") for value in (1, 1.5, -0.1, "0.1", True, None, {})),
    *(({"bias": value}, "bias") for value in ("some", None, True, ["none"])),
    *(({"rank_pattern": value}, "rank_pattern") for value in (False, [], "q_proj", 3)),
    ({"rank_pattern": {"q_proj": "3"}}, "rank_pattern, 'q_proj': expected a positive number, found '3'"),
    *(({"rank_pattern": {"q_proj": value}}, "rank_pattern") for value in (0, True, 2.5, None, 1 << 40)),
    *(({"alpha_pattern": {"q_proj": value}}, "alpha_pattern") for value in ("5", 1e30, True, None, 0)),
    *(({"alpha_pattern": {key: 5}}, "alpha_pattern, key") for key in ("(", "a{99999999999}", "(?:" * 400, "", "a\0b")),
    ({"alpha_pattern": {f"(a{i}|b)": 5 for i in range(2000)}}, "alpha_pattern: expected names, and at most 1024"),
    *(({"target_modules": value}, "target_modules") for value in (5, True, {"q_proj": 1}, [1], ["q_proj", None], "(")),
    *(({"target_modules": value}, "target_modules") for value in (["x" * 5000], ["a\nb"], "x" * 70_000, "", [""])),
    ({"target_modules": r"(\w+\.?)+!"}, "target_modules: expected a regular expression that is matched"),
    ({"target_modules": "(.*)*x"}, "target_modules: expected a regular expression that is matched"),
    ({"exclude_modules": r"(\w+\.?)+!"}, "exclude_modules: expected a regular expression that is matched"),
    ({"rank_pattern": {r"([\w.]+)+!": 3}}, "rank_pattern, '([\\\\w.]+)+!': expected a regular expression that is"),
    *(({"modules_to_save": [value]}, "modules_to_save: expected a list of names") for value in (r"(\w+)+!", "(", "")),
    *(({"layers_pattern": value}, "layers_pattern: expected a name, or") for value in ("(.*)*x", ["("], "(a)", 5, [5])),
    ({"target_parameters": "mlp.experts.down_proj"}, "target_parameters: expected a list of names"),
    ({"target_parameters": [3]}, "target_parameters"),
    *(({"modules_to_save": value}, "modules_to_save") for value in ("lm_head", [1], {"a": 1}, True)),
    *(({"layers_to_transform": value}, "layers_to_transform") for value in ("1", [1.5], -1, True, 1 << 40, {"a": 1})),
    *(
        ({"trainable_token_indices": value}, "trainable_token_indices")
        for value in (
            "1",
            [-1],
            [True],
            [1 << 40],
            {"embed_tokens": 3},
            {"embed_tokens": ["1"]},
            {"embed_tokens": []},
            7,
        )
    ),
    *(({"task_type": value}, "task_type") for value in ("OTHER", 3, ["CAUSAL_LM"], {})),
    *(({"peft_type": value}, "peft_type") for value in ("IA3", None, 3, ["LORA"], "lora")),
    *(
        ({"init_lora_weights": value}, "init_lora_weights")
        for value in ("x", 1, None, "pissa_niter_99999", "loftq", [])
    ),
    *(({"base_model_name_or_path": value}, "base_model_name_or_path") for value in (3, ["x"], "a\0b", "x" * 9000)),
    ({"peft_version": 0.18}, "peft_version"),
    ({"peft_version": "9" * 5000}, "peft_version"),
    ({"revision": 3}, "revision"),
]
HARMLESS = [
    {"megatron_config": None, "megatron_core": "megatron.core", "loftq_config": {}, "eva_config": None},
    {"runtime_config": {"ephemeral_gpu_offload": False}, "qalora_group_size": 16, "layer_replication": None},
    {"use_bdlora": None, "lora_ga_config": None, "velora_config": None, "monteclora_config": None, "kasa_config": None},
    {"a_key_of_later_releases": None, "another": False, "third": []},
    {"rank_pattern": None, "alpha_pattern": None, "revision": None, "exclude_modules": None, "modules_to_save": []},
    {"auto_mapping": {"base_model_class": "Qwen3MoeForCausalLM", "parent_library": "transformers.models.qwen3_moe"}},
    {"auto_mapping": {"base_model_class": "A", "parent_library": "transformers", "some_mark": True}, "task_type": None},
    {"trainable_token_indices": []},
    {"init_lora_weights": False, "lora_dropout": 0, "use_rslora": False},
    *({"init_lora_weights": way} for way in ("gaussian", "eva", "orthogonal", "mica")),
    {"rank_pattern": {f"no.such.layer.{i}": 3 for i in range(20_000)}},
]


@pytest.fixture(scope="module")
def doors(tmp_path_factory):
    return Doors(tmp_path_factory.mktemp("schema"))


@pytest.fixture
def adapter(doors, tmp_path):
    return shutil.copytree(doors.adapter, tmp_path / "adapter")


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A module that leaves a mark when it is imported."""
    mark = tmp_path / "was-imported"
    (tmp_path / "planted_module.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield mark
    sys.modules.pop("planted_module", None)


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=lambda value: str(value)[:50])
def test_values_that_cannot_be_are_refused(doors, adapter, planted, change, words):
    edit(adapter, **change)
    began = time.process_time()
    doors.refuse(adapter, words, is_quick=True)
    assert not planted.exists() and "planted_module" not in sys.modules
    assert time.process_time() - began < 2


EVERYWHERE = [CODE, {"use_rslora": "no"}, {"rank_pattern": False}, {"lora_alpha": 1e30}, {"target_modules": "(.*)*x"}]


@pytest.mark.parametrize("change", EVERYWHERE, ids=lambda value: str(value)[:50])
def test_every_door_looks(doors, adapter, planted, change):
    edit(adapter, **change)
    doors.refuse(adapter, next(iter(change)))
    assert not planted.exists() and "planted_module" not in sys.modules


@pytest.mark.parametrize("change", HARMLESS, ids=lambda value: str(value)[:50])
def test_keys_at_harmless_values_pass(doors, adapter, change):
    edit(adapter, **change)
    began = time.process_time()
    doors.take(adapter)
    assert time.process_time() - began < 4


TEXTS = {
    "no object": (b"[]", "expected a JSON object, found a JSON"),
    "a number": (b"3", "expected a JSON object, found a JSON"),
    "empty": (b"", "expected a JSON object"),
    "BOM": (b"\xef\xbb\xbf{}", "expected a JSON object"),
    "UTF-16": ('{"peft_type": "LORA"}'.encode("utf-16"), "expected UTF-8"),
    "nested": (b'{"a":' * 100_000, "expected a JSON object"),
    "large": (b'{"a": "' + b"x" * (17 << 20) + b'"}', "expected at most 16777216 bytes"),
    "digits": (b'{"peft_type": "LORA", "r": ' + b"9" * 6000 + b"}", "expected a JSON object"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_no_json_object(doors, adapter, name):
    raw, words = TEXTS[name]
    (adapter / "adapter_config.json").write_bytes(raw)
    doors.refuse(adapter, words, is_quick=True)


@pytest.mark.parametrize("name", ["adapter_config.json", "kt_sft.json"])
@pytest.mark.parametrize("text", ['"r": NaN', '"lora_alpha": Infinity', '"lora_alpha": 1e999', '"r": 3, "r": 3'])
def test_json_that_readers_understand_differently(doors, adapter, name, text):
    file = adapter / name
    file.write_text(file.read_text().rstrip().removesuffix("}") + f", {text} }}")
    if "1e999" in text:  # a number, but none that this key may have; kt_sft.json has no such key
        return None if name == "kt_sft.json" else doors.refuse(adapter, "adapter_config.json", is_quick=True)
    return doors.refuse(adapter, name, is_quick=True)


@pytest.mark.parametrize("name", ["adapter_config.json", "kt_sft.json"])
@pytest.mark.parametrize("kind", ["directory", "pipe", "loop", "device"])
def test_what_is_no_regular_file_is_not_opened(doors, adapter, name, kind):
    file = adapter / name
    file.unlink()
    made = {"directory": os.mkdir, "pipe": os.mkfifo}
    if kind in made:
        made[kind](file)
    else:
        file.symlink_to(file if kind == "loop" else "/dev/zero")
    doors.refuse(adapter, "adapter", is_quick=kind != "pipe")


@pytest.mark.parametrize("values", [
    {"lora_dropout": "0.1"}, {"lora_dropout": True}, {"lora_dropout": 1}, {"model_type": 3}, {"layout": "peft-9"},
    {"layout": ["peft-0.18"]},
])  # fmt: skip
def test_values_beside_the_config(doors, adapter, values):
    (adapter / "kt_sft.json").write_text(json.dumps(values))
    doors.refuse(adapter, f"kt_sft.json: {next(iter(values))}", is_quick=True)


def test_a_regular_expression_that_is_quick_stays_as_it_is(doors, adapter, tmp_path):
    pattern = r".*(?!visual)layers\.\d+\.self_attn\.(q|k|v|o)_proj|.*\.mlp\.x"
    edit(adapter, target_modules=pattern, rank_pattern={r".*self_attn\.(q|k)_proj": 3})
    model = kt_peft.load_adapter(doors.model, adapter)
    model.save_pretrained(tmp_path / "again")
    model.unload()
    saved = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert saved["target_modules"] == pattern and saved["rank_pattern"] == {r".*self_attn\.(q|k)_proj": 3}


def test_a_config_that_names_nothing_is_no_question_for_peft(doors, adapter):
    edit(adapter, target_modules=None, target_parameters=None)
    damaged(lambda tensors: {name: tensor for name, tensor in tensors.items() if ".experts." not in name})(adapter)
    with pytest.raises(FormatError, match="target_modules: expected names of modules, as PEFT has no default"):
        adapter_dir.check_adapter(doors.model, adapter)


def test_pefts_own_calls_are_given_the_same_values(doors, planted):
    for change, words in (
        (CODE, "megatron_config"),
        ({"use_rslora": "no"}, "use_rslora"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"rank_pattern": {"q_proj": "3"}}, "rank_pattern"),
    ):
        with pytest.raises(ValueError, match=words):
            kt_peft.get_peft_model(parity.load_ours(doors.base), parity.all_linear(**change))
    assert not planted.exists()


def test_a_pipe_below_the_named_base_model_is_not_read(doors, adapter, tmp_path):
    os.mkfifo(tmp_path / "config.json")
    (adapter / "kt_sft.json").unlink()
    edit(adapter, base_model_name_or_path=str(tmp_path))
    kt_peft.load_adapter(doors.model, adapter).unload()
    with pytest.raises(FormatError):
        doors.calls["inspect"](adapter.parent)
