"""KTransformers' keys: what they mean here, what has no effect, and what contradicts itself."""

from __future__ import annotations

import pytest

from kt_sft.errors import ConfigError, near
from kt_sft.integrations.llamafactory.peer_keys import translate

NESTED = {"kt_expert_weight_format": "int8", "kt_backend": "AMXINT8", "kt_num_threads": 96, "kt_tp_enabled": True,
          "kt_threadpool_count": 2, "kt_max_cache_depth": 2, "kt_model_max_length": 2176, "kt_share_backward_bb": True,
          "kt_weight_lifecycle": "persistent", "kt_num_gpu_experts": 0}  # fmt: skip
OURS = {"kt_method": "INT8", "cpu_infer": 96, "kt_threadpool_count": 2}


def same(found, expected):
    """`AMXINT8` is another name of `INT8`."""
    return {key: "INT8" if value == "AMXINT8" else value for key, value in found.items()} == expected


def test_a_mapping_is_read_and_what_has_no_effect_is_said():
    found, notes = translate({"use_kt": True, "kt_config": NESTED})
    assert same(found, {"use_kt": True, **OURS})
    said = [note.partition(":")[0] for note in notes]
    silent = ("kt_expert_weight_format", "kt_backend", "kt_num_threads", "kt_threadpool_count")
    assert said == [f"kt_config.{key}" for key in NESTED if key not in silent]
    assert all("no effect: " in note and "\n" not in note for note in notes)


def test_earlier_releases_have_the_keys_beside_the_others():
    flat = {key: value for key, value in NESTED.items() if key != "kt_threadpool_count"}
    found, notes = translate({"use_kt": True, "kt_threadpool_count": 2, **flat})
    assert same(found, {"use_kt": True, **OURS}) and len(notes) == 6


@pytest.mark.parametrize("words", [
    ["--kt_config", '{"kt_backend": "AMXINT8", "kt_num_threads": 96, "kt_threadpool_count": 2}'],
    ['--kt_config={"kt_expert_weight_format": "int8", "kt_num_threads": 96, "kt_threadpool_count": 2}'],
    ["--kt_config.kt_backend", "AMXINT8", "--kt_config.kt_num_threads=96", "--kt_config.kt_threadpool_count", "2"],
    ["--kt-backend", "AMXINT8", "--kt_num_threads", "96", "--kt_threadpool_count", "2"],
])  # fmt: skip
def test_command_line_words(words):
    found, notes = translate(["--use_kt", "--stage", "sft", *words, "--do_train"])
    assert found[:3] == ["--use_kt", "--stage", "sft"] and "--do_train" in found and not notes
    pairs = dict(zip(found, found[1:], strict=False))
    assert pairs["--kt_method"] in ("INT8", "AMXINT8") and pairs["--cpu_infer"] == "96"
    assert pairs["--kt_threadpool_count"] == "2" and len(found) == 10


@pytest.mark.parametrize("values", [{"use_kt": True, "cpu_infer": 4}, ["--use_kt", "true", "--cpu_infer", "4"], {}, []])
def test_others_are_left_alone(values):
    assert translate(values) == (values, [])


@pytest.mark.parametrize(("values", "words"), [
    ({"kt_config": {"kt_backend": "AMXBF16", "kt_expert_weight_format": "int8"}}, ["kt_method", "AMXBF16", "int8"]),
    ({"kt_method": "INT4", "kt_config": {"kt_backend": "AMXINT8"}}, ["kt_config.kt_backend", "kt_method", "INT4"]),
    ({"cpu_infer": 8, "kt_num_threads": 96}, ["kt_num_threads", "cpu_infer", "8", "96"]),
    ({"kt_num_threads": 8, "kt_config": {"kt_num_threads": 9}}, ["kt_num_threads", "cpu_infer", "8", "9"]),
    ({"kt_threadpool_count": 1, "kt_config": {"kt_threadpool_count": 2}}, ["kt_threadpool_count"]),
    ({"lora_rank": 8, "kt_config": {"kt_lora_rank": 4}}, ["kt_lora_rank", "lora_rank"]),
    (["--cpu_infer", "8", "--kt_num_threads", "96"], ["kt_num_threads", "cpu_infer"]),
    ({"kt_config": {"kt_bakend": "AMXINT8"}}, ["kt_config.kt_bakend", "did you mean 'kt_backend'"]),
    ({"kt_config": {"kt_moon_phase": 1}}, ["kt_config.kt_moon_phase", "unknown key; remove it"]),
    ({"kt_config": [1]}, ["kt_config", "mapping"]),
    ({"kt_config": "AMXINT8"}, ["kt_config", "mapping", "AMXINT8"]),
])  # fmt: skip
def test_contradictions_and_unknown_keys(values, words):
    with pytest.raises(ConfigError) as caught:
        translate(values)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(("keys", "expected"), [
    ({"kt_backend": "auto"}, {}),
    ({"kt_expert_weight_format": "fp8"}, {}),
    ({"kt_method": "INT8", "kt_config": {"kt_backend": "AMXINT8", "kt_expert_weight_format": "int8"}},
     {"kt_method": "INT8"}),
    ({"cpu_infer": 8, "kt_num_threads": 8}, {"cpu_infer": 8}),
    ({"kt_config": '{"kt_method": "INT4"}'}, {"kt_method": "INT4"}),
    ({"kt_config": {"enabled": True, "kt_train_mode": "full"}}, {"finetuning_type": "full"}),
    ({"kt_config": {"kt_cpu_activation": "recompute", "chunk_size": 64}},
     {"kt_cpu_activation": "recompute", "chunk_size": 64}),
    ({"kt_config": None}, {}),
])  # fmt: skip
def test_meaning(keys, expected):
    assert translate(keys)[0] == expected


def test_a_format_that_is_not_held_is_said():
    assert "INT8" in translate({"kt_config": {"kt_expert_weight_format": "fp8"}})[1][0]


@pytest.mark.parametrize("name", ["kt_moon_phase", "kt_tp_enabled", "kt_non_expert_weight_path", "kt_share_backward_bb",
                                  "kt_max_cache_depth", "kt_config", "warp_drive"])  # fmt: skip
def test_no_hint_for_a_name_that_is_not_close(name):
    from kt_sft.integrations.llamafactory import args

    assert near(name, args.KEYS) is None


@pytest.mark.parametrize(("name", "meant"), [
    ("kt_methd", "kt_method"), ("kt_mehtod", "kt_method"), ("method", "kt_method"), ("cpu_infre", "cpu_infer"),
    ("kt_weigth_path", "kt_weight_path"), ("chunk_sise", "chunk_size"), ("kt_cpu_linears", "kt_cpu_linear"),
])  # fmt: skip
def test_hints_for_misspelt_names(name, meant):
    from kt_sft.integrations.llamafactory import args

    assert near(name, args.KEYS) == meant
