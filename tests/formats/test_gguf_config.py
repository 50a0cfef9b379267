"""config.json from GGUF metadata: the values that the model's own config.json has."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, DeepseekV2Config

from kt_sft.errors import FormatError, UnsupportedModel
from kt_sft.formats.gguf import GgufIndex
from kt_sft.formats.gguf_config import model_config
from kt_sft.formats.gguf_export import model_metadata
from tests.helpers import gguf_files

# As llama.cpp's converter writes them for DeepSeek-V2-Lite.
V2_LITE = {
    "context_length": 163840,
    "embedding_length": 2048,
    "block_count": 27,
    "feed_forward_length": 10944,
    "attention.head_count": 16,
    "attention.head_count_kv": 16,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.key_length": 192,
    "attention.value_length": 128,
    "attention.kv_lora_rank": 512,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": 64,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 40.0,
    "rope.scaling.original_context_length": 4096,
    "rope.scaling.yarn_log_multiplier": 0.0707,
    "expert_count": 64,
    "expert_used_count": 6,
    "expert_feed_forward_length": 1408,
    "expert_shared_count": 2,
    "expert_weights_scale": 1.0,
    "leading_dense_block_count": 1,
}


def config_of(tmp_path, **changes):
    keys = {key: value for key, value in {**V2_LITE, **changes}.items() if value is not None}
    metadata = {"general.architecture": "deepseek2"} | {f"deepseek2.{key}": value for key, value in keys.items()}
    tensors = {name: gguf_files.random_blocks("Q8_0", (102400, 32)) for name in ("token_embd.weight", "output.weight")}
    return model_config(GgufIndex.from_path(gguf_files.write(tmp_path / "m.gguf", metadata, tensors)))


def test_deepseek_v2_lite(tmp_path):
    values = config_of(tmp_path)
    ours = AutoConfig.for_model(**values)
    scaling = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    scaling |= {"mscale": 0.707, "mscale_all_dim": 0.707}
    theirs = DeepseekV2Config(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
        num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2, n_routed_experts=64,
        routed_scaling_factor=1.0, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, v_head_dim=128,
        qk_nope_head_dim=128, n_group=1, topk_group=1, topk_method="greedy", num_experts_per_tok=6,
        first_k_dense_replace=1, norm_topk_prob=False, max_position_embeddings=163840, rms_norm_eps=1e-6,
        rope_theta=10000, rope_scaling=scaling,
    )  # fmt: skip
    assert isinstance(ours, DeepseekV2Config)
    for name, value in theirs.to_dict().items():
        if name in values and name not in ("rope_scaling", "architectures"):
            assert getattr(ours, name) == value, name
    assert ours.rope_parameters == theirs.rope_parameters


def test_kinds_of_deepseek(tmp_path):
    v3 = config_of(tmp_path, expert_gating_func=2, expert_group_count=8, expert_group_used_count=4, block_count=28)
    assert (v3["model_type"], v3["n_group"], v3["topk_group"], v3["norm_topk_prob"]) == ("deepseek_v3", 8, 4, True)
    assert config_of(tmp_path, block_count=28, nextn_predict_layers=1)["num_hidden_layers"] == 27
    per_layer = {"attention.head_count": [16] * 27}
    assert config_of(tmp_path, **per_layer)["num_attention_heads"] == 16


def test_special_tokens_and_blocks(tmp_path):
    """Tokens stay in the vocabulary; a list has one number for each block; blocks that are told of are in the file."""
    metadata = {"general.architecture": "deepseek2"} | {f"deepseek2.{key}": value for key, value in V2_LITE.items()}
    tensors = {name: gguf_files.random_blocks("Q8_0", (64, 32)) for name in ("token_embd.weight", "blk.26.x.weight")}

    def config(**changes):
        file = gguf_files.write(tmp_path / "m.gguf", {**metadata, **changes}, tensors)
        return model_config(GgufIndex.from_path(file))

    ids = {f"tokenizer.ggml.{name}_token_id": number for number, name in enumerate(("bos", "eos", "padding"), 61)}
    found = config(**ids)
    assert (found["bos_token_id"], found["eos_token_id"], found["pad_token_id"]) == (61, 62, 63)
    for changes, match in (
        ({"tokenizer.ggml.eos_token_id": 64}, "m.gguf: tokenizer.ggml.eos_token_id: expected a token from 0 to 63"),
        ({"tokenizer.ggml.padding_token_id": "x"}, "tokenizer.ggml.padding_token_id: expected a token from 0 to 63"),
        ({"deepseek2.attention.head_count": [16] * 26}, "or one for each of 27 blocks, found 26 of them"),
        ({"deepseek2.block_count": 28}, "deepseek2.block_count: expected at most 27, the blocks in the file, found 28"),
        ({"deepseek2.nextn_predict_layers": 27}, "nextn_predict_layers: expected a whole number below block_count 27"),
        ({"deepseek2.block_count": [27, 27]}, "block_count: expected"),
    ):
        with pytest.raises(FormatError, match=match):
            config(**changes)


@pytest.mark.parametrize(
    ("changes", "match", "error"),
    [
        ({"expert_used_count": None}, "deepseek2.expert_used_count: expected present, found missing", FormatError),
        ({"rope.freq_base": "x"}, "deepseek2.rope.freq_base: expected a number, found x", FormatError),
        ({"attention.head_count": [16, 8]}, r"expected one whole number, found \[16  8\]", FormatError),
        ({"rope.scaling.type": "longrope"}, "rope scaling: expected none, linear or yarn, found 'longrope'", None),
        ({"expert_count": ["a", "b"]}, r"expert_count: expected one whole number, found \['a', 'b'\]", FormatError),
        ({"some_new_key": 7}, "deepseek2.some_new_key: expected keys of a model .* found 7; use the model dir", None),
        ({"attention.sliding_window": 4096}, "sliding_window: expected attention to all of the .* found 4096", None),
        ({"attention.causal": False}, "attention.causal: expected True, found False", None),
        ({"rope.scaling.yarn_attn_factor": 0.5}, "yarn_attn_factor: expected 1.0, found 0.5", None),
        ({"expert_gating_func": [2, 2]}, "expert_gating_func: expected 1 or 2, found array", None),
        ({"expert_count": 0}, "expected a mixture of experts, found a dense model", None),
    ],
)
def test_keys_that_do_not_fit(tmp_path, changes, match, error):
    with pytest.raises(error or UnsupportedModel, match=match):
        config_of(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.factor": 4.0, "rope.scaling.type": "none"}, None),
        ({}, None),
    ],
)
def test_rope_scaling_without_a_type_is_linear(tmp_path, changes, scaling):
    """As llama.cpp reads such files, and those with the key's old name."""
    yarn = dict.fromkeys(key for key in V2_LITE if key.startswith("rope.scaling"))
    assert config_of(tmp_path, **{**yarn, **changes}).get("rope_scaling") == scaling


def test_keys_of_newer_converters(tmp_path):
    """Those that repeat what the tensors say, change nothing, or refine yarn."""
    inert = {"vocab_size": 102400, "attention.sliding_window": 0, "attention.causal": True}
    yarn = {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 1.5, "rope.scaling.finetuned": True}
    scaling = config_of(tmp_path, **inert, **yarn, expert_group_count=1, expert_group_used_count=1)["rope_scaling"]
    assert (scaling["beta_fast"], scaling["beta_slow"]) == (16, 1.5)


def test_yarn_leaves_as_it_came(tmp_path):
    """config.json of a file, and the keys that such a config becomes; what no key states is refused."""
    yarn = {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 1.5}
    config = AutoConfig.for_model(**config_of(tmp_path, **yarn)).to_dict()
    values = model_metadata(config, "name", "BF16")
    for key, value in {**V2_LITE, **yarn}.items():
        if key.startswith("rope."):
            assert values[f"deepseek2.{key}"] == pytest.approx(value), key
    for name in ("mscale", "attention_factor"):
        changed = {**config, "rope_parameters": {**config["rope_parameters"], name: 0.5}}
        with pytest.raises(UnsupportedModel, match=f"GGUF model: {name}: expected .* found 0.5; merge into hf"):
            model_metadata(changed, "name", "BF16")
