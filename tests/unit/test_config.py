"""KTConfig and the environment table: every fault is found at once and named with its remedy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kt_sft import env
from kt_sft.config import KTConfig
from kt_sft.errors import ConfigError, FormatError, NotEnoughMemory, UnsupportedHardware, nearest


@pytest.mark.parametrize(
    ("name", "method"),
    [("BF16", "BF16"), ("AMXBF16", "BF16"), ("amxbf16", "BF16"), ("int8", "INT8"), ("AMXINT8", "INT8")]
    + [("MOE_INT8", "INT8"), ("INT4", "INT4"), ("amxint4", "INT4"), ("MOE_INT4", "INT4")],
)
def test_method_names(name, method):
    config = KTConfig(method=name)
    assert config.method == method and config.format == method.lower()


def test_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match=r"method: expected one of BF16, INT8, INT4, .*'BF61'; did you mean 'BF16'"):
        KTConfig(method="BF61")


@pytest.mark.parametrize("size", [0, 16, 256, 32.0, True, "32"])
def test_group_size_is_one_of_three(size):
    with pytest.raises(ConfigError, match="int4_group_size: expected one of 32, 64, 128, found"):
        KTConfig(method="INT4", int4_group_size=size)


def test_int8_activations_need_quantised_weights():
    with pytest.raises(ConfigError, match="expert_activations: int8 needs method INT8, INT4 or RAWINT4, found BF16"):
        KTConfig(method="AMXBF16", expert_activations="int8")
    with pytest.raises(ConfigError, match="expert_activations: bfp16 needs method INT8, INT4, RAWINT4 or GGUF, found"):
        KTConfig(expert_activations="bfp16")
    assert KTConfig(method="INT4", expert_activations="int8").expert_activations == "int8"


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"])
def test_every_kernel_level_has_a_name(level):
    from kt_sft.native import native

    assert KTConfig(isa=level).isa == level
    with pytest.raises(ValueError, match=level):  # the library knows the same names
        native().set_isa("none of them")


def test_all_faults_are_listed_in_one_message():
    with pytest.raises(ConfigError) as caught:
        KTConfig(
            method="X", threads=0, chunk_size=True, expert_lora="yes", cpu_activation="keep", isa="sse", weight_path="",
            int4_group_size=48, expert_activations="fp8", cpu_linear="on", max_deferred_experts_per_token=-1,
        )  # fmt: skip
    assert len(caught.value.faults) == 11
    text = str(caught.value)
    assert "\n" not in text
    names = ("method", "threads", "chunk_size", "expert_lora", "cpu_activation", "isa", "weight_path")
    for name in (*names, "int4_group_size", "expert_activations", "cpu_linear", "max_deferred_experts_per_token"):
        assert f"{name}:" in text


@pytest.mark.parametrize(
    "values",
    [
        {"threads": 4},
        {"method": "AMXINT4", "int4_group_size": 128, "expert_activations": "int8", "cpu_linear": "off"},
        {"threadpool_count": 2},
        {"cpu_activation": "recompute"},
        {"isa": "scalar"},
        {"expert_lora": False},
    ],
)
def test_dict_round_trip_keeps_values(values):
    config = KTConfig(**values)
    assert KTConfig.from_dict(config.to_dict()) == config


def test_unknown_key_and_wrong_value_are_listed_together():
    with pytest.raises(ConfigError) as caught:
        KTConfig.from_dict({"chunk_sise": 5, "threads": -1})
    assert caught.value.faults[0] == "chunk_sise: unknown setting; did you mean 'chunk_size'?"
    assert caught.value.faults[1].startswith("threads:")


def test_nearest_lists_the_known_names_when_none_is_close():
    assert nearest("qqqq", ["alpha", "beta"]) == "known: alpha, beta"


def test_the_beginning_of_one_name_means_it():
    assert nearest("embed", ["embed_tokens", "norm"]) == "did you mean 'embed_tokens'?"
    assert nearest("embed", ["embed_tokens", "embed_other_ones"]).startswith("known: ")


def test_error_messages_are_one_line_with_expected_found_remedy():
    error = FormatError("a.safetensors", "tensor w", expected="shape [2]", found=[3], remedy="download it again")
    assert str(error) == "a.safetensors: tensor w: expected shape [2], found [3]; download it again"
    hardware = UnsupportedHardware("CPU", needed="AVX2", found="scalar", remedy="use another")
    assert str(hardware) == "CPU: needed AVX2, found scalar; use another"
    memory = NotEnoughMemory("experts", needed_bytes=3 << 30, available_bytes=1 << 29, limited_by="the cgroup")
    assert str(memory) == "experts: needed 3.00 GiB, available 0.50 GiB (limited by the cgroup)"
    assert isinstance(memory, MemoryError) and isinstance(error, ValueError)


def test_environment_values_are_checked(monkeypatch):
    monkeypatch.setenv("KT_SFT_THREADS", "3")
    assert env.threads() == 3
    monkeypatch.setenv("KT_SFT_THREADS", "three")
    with pytest.raises(ConfigError, match="KT_SFT_THREADS: expected a whole number >= 1, found 'three'"):
        env.threads()
    monkeypatch.setenv("KT_SFT_THREADS", " ")
    assert env.threads() is None
    monkeypatch.setenv("KT_SFT_ISA", "AVX2")
    assert env.isa() == "avx2"
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert env.local_world_size() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert env.local_world_size() == 2


def test_environment_table_is_complete():
    with pytest.raises(KeyError, match="add it there first"):
        env.read("KT_SFT_UNHEARD_OF")
    assert all(variable.doc for variable in env.VARIABLES)


def test_import_loads_neither_torch_nor_transformers():
    code = (
        "import sys; import kt_sft, kt_sft.env, kt_sft.errors, kt_sft.config; kt_sft.KTConfig; "
        "print([m for m in ('torch', 'transformers', 'numpy', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_public_name_lists_the_known_ones():
    import kt_sft

    with pytest.raises(AttributeError, match="load_adapter"):
        kt_sft.load_modell  # noqa: B018
