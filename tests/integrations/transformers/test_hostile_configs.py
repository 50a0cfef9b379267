"""What a model directory, GGUF file or run file says of a model, at the doors that read it: one line, before work."""

from __future__ import annotations

import json
import os
import re
import sys
import time

import pytest
from typer.testing import CliRunner

import kt_sft
from kt_sft.cli import app
from kt_sft.errors import ConfigError, FormatError, KTError, UnsupportedModel
from kt_sft.integrations.llamafactory.planning import plan_run
from kt_sft.integrations.transformers.loading import check_model
from tests.helpers import adapters, gguf_files, gguf_models, tiny_models

CONFIG = {
    "10^9 layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected a whole number from 1 to 1024"),
    "more layers than weights": (
        {"num_hidden_layers": 900},
        "num_hidden_layers: expected at most 2, the layers of the",
    ),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads: expected"),
    "experts of a token": (
        {"num_experts_per_tok": 8},
        "num_experts_per_tok: expected a whole number from 1 to num_\\w*experts 7",
    ),
    "end token": ({"eos_token_id": [2, 131]}, "eos_token_id: expected a token from 0 to 130"),
    "padding": ({"pad_token_id": -1}, "pad_token_id: expected a token from 0 to 130"),
    "an activation that is none": ({"hidden_act": "sulu"}, "config of a known model, found KeyError: 'sulu'"),
    "a rope that is none": (
        {"rope_scaling": {"rope_type": "helix"}},
        "config of a known model, found KeyError: 'helix'",
    ),
    "a dtype that is none": ({"dtype": "float99"}, "config of a known model, found .*float99"),
    "layer types": ({"layer_types": ["full_attention", 5]}, "Class validation error .* `layer_types`"),
    "attention": ({"attn_implementation": 5}, "config of a known model, found"),
    "no quantization": ({"quantization_config": {}}, "quantization_config: expected quant_method"),
    "of a type that transformers checks": ({"use_cache": "maybe"}, "use_cache.* expected bool"),
}
GENERATION = {
    "a token": ({"eos_token_id": 10**6}, "eos_token_id: expected a token from 0 to 130"),
    "a list": ([], "expected a JSON object"),
    "a mode": ({"cache_implementation": "x"}, "generation_config.json"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    adapters.make("qwen3_moe", root)
    return root


@pytest.fixture
def model(root):
    """The model directory, and afterwards its own config again."""
    file = root / "base" / "config.json"
    text = file.read_text()
    yield root / "base"
    file.write_text(text)
    (root / "base" / "generation_config.json").unlink(missing_ok=True)


def refused(door, match, name="config.json"):
    begin = time.process_time()
    with pytest.raises(KTError, match=match) as raised:
        door()
    text = str(raised.value)
    assert name in text and text.isprintable() and len(text) < 1000
    assert time.process_time() - begin < 2


@pytest.mark.parametrize("fault", CONFIG)
def test_config_values(model, tmp_path, fault):
    changes, match = CONFIG[fault]
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    refused(lambda: check_model(model, kt_sft.KTConfig()), match)
    refused(lambda: kt_sft.load_model(model), match)
    run = tmp_path / "run.yaml"
    run.write_text(f"model_name_or_path: {model}\nuse_kt: true\nuse_cpu: true\n")
    refused(lambda: plan_run(run), match)


@pytest.mark.parametrize("fault", GENERATION)
def test_generation_config_is_read_before_the_weights(model, fault):
    values, match = GENERATION[fault]
    (model / "generation_config.json").write_text(json.dumps(values))
    refused(lambda: kt_sft.load_model(model), match, "generation_config.json")


@pytest.mark.parametrize("kind", ["pipe", "folder", "utf-16", "large", "loop"])
def test_files_that_are_no_config(model, kind):
    file = model / "config.json"
    text = file.read_text()
    file.unlink()
    try:
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "folder":
            file.mkdir()
        elif kind == "utf-16":
            file.write_text(text, encoding="utf-16")
        elif kind == "large":
            with file.open("wb") as stream:
                stream.truncate(100 << 20)
        else:
            file.symlink_to("config.json")
        refused(lambda: kt_sft.load_model(model), "expected")
    finally:
        file.rmdir() if file.is_dir() else file.unlink()


GGUF = {
    "qwen3moe.block_count": [
        (10**9, "block_count: expected a whole number from 1"),
        (0, "block_count"),
        (3, "at most 2"),
    ],
    "qwen3moe.attention.head_count": [
        (0, "attention.head_count: expected a whole number"),
        ([4] * 3, "each of 2 blocks"),
    ],
    "qwen3moe.attention.head_count_kv": [(3, "attention.head_count_kv: expected a divisor"), ("2", "head_count_kv")],
    "qwen3moe.expert_used_count": [
        (9, "expert_used_count: expected a whole number from 1 to"),
        (1.5, "expert_used_count"),
    ],
    "qwen3moe.expert_count": [(10**9, "expert_count"), (("i32", -1), "expert_count")],
    "qwen3moe.embedding_length": [(0, "embedding_length"), (2**31, "embedding_length")],
    "qwen3moe.rope.freq_base": [(float("nan"), "rope.freq_base"), (-1.0, "rope.freq_base"), (["x"], "rope.freq_base")],
    "qwen3moe.attention.layer_norm_rms_epsilon": [(-1.0, "layer_norm_rms_epsilon"), (0.0, "layer_norm_rms_epsilon")],
    "tokenizer.ggml.eos_token_id": [
        (131, "eos_token_id: expected a token"),
        ("2", "eos_token_id"),
        ([1, 2**20], "eos"),
    ],
    "tokenizer.ggml.add_bos_token": [("no", "add_bos_token: expected true or false"), ([1, 2], "add_bos_token")],
    "tokenizer.ggml.pre": [([1, 2], "tokenizer.ggml.pre: expected a text")],
    "tokenizer.ggml.model": [(["gpt2"], "tokenizer.ggml.model: expected a text")],
    "tokenizer.chat_template": [([1], "tokenizer.chat_template: expected a text")],
    "tokenizer.ggml.token_type": [([float("nan")] * 131, "token_type: expected finite numbers")],
    "tokenizer.ggml.tokens": [(["x"] * 131, "tokens: expected every token once"), (["y" * 2000], "at most 1024 char")],
    "general.architecture": [(["qwen3moe"], "general.architecture: expected a text"), ([1, 2], "a text")],
    "qwen3moe.rope.scaling.type": [([1, 2], "rope.scaling.type: expected a text")],
}


@pytest.fixture(scope="module")
def gguf(root):
    """Metadata and tensors of a whole model."""
    written = {}

    def keep(path, metadata, tensors, **more):
        written.update(metadata=dict(metadata), tensors=dict(tensors))
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_models.gguf_files, "write", keep)
        gguf_models.write_model(root / "base", root / "m.gguf")
    return written


@pytest.mark.parametrize("key", GGUF)
def test_gguf_metadata(gguf, tmp_path, key):
    for value, match in GGUF[key]:
        file = gguf_files.write(tmp_path / "m.gguf", {**gguf["metadata"], key: value}, gguf["tensors"])
        refused(
            lambda file=file: kt_sft.load_model(file, kt_sft.KTConfig(weight_cache=str(tmp_path / "c"))),
            match,
            "m.gguf",
        )
    assert not (tmp_path / "c").exists() or not any((tmp_path / "c").iterdir())


def test_split_numbers_that_are_lists(gguf, tmp_path):
    files = gguf_files.write_split(tmp_path, "m", {}, gguf["tensors"], 2)
    for key, value in (("split.no", [0, 1]), ("split.count", [2, 2]), ("split.tensors.count", [1, 2])):
        own = {"split.no": ("u16", 0), "split.count": ("u16", 2), "split.tensors.count": ("i32", 1), key: value}
        gguf_files.write(files[0], own, dict(list(gguf["tensors"].items())[::2]))
        refused(
            lambda: kt_sft.formats.gguf.GgufIndex.from_path(tmp_path),
            "split.no and split.count|tensors of all parts",
            "m-",
        )


COMMANDS = {
    "a device": (["plan", "RUN", "--device", "meta"], "device: expected cpu"),
    "another device": (["plan", "RUN", "--device", "cuda:-1"], "device: expected cpu"),
    "a word": (["plan", "RUN", "=x"], "expected key=value"),
    "a deep word": (["plan", "RUN", f"{'a.' * 40}b=1"], "expected key=value"),
    "a word that is no YAML": (["plan", "RUN", "kt_rule_vars=" + "[" * 5000], "more than 32 levels"),
    "a length": (["plan", "RUN", "cutoff_len=9999999999999999"], "cutoff_len: expected a whole number from 1"),
    "no number": (["plan", "RUN", "cutoff_len=.nan"], "cutoff_len: expected a whole number from 1"),
    "a path": (["plan", "RUN", 'kt_weight_path="a\\0b"'], "a NUL in a text"),
    "a long path": (["plan", "RUN", f"kt_weight_path={'x' * 5000}"], "kt_weight_path: expected a path of at most 4096"),
    "no path": (["plan", "RUN", "kt_weight_path=5"], "kt_weight_path: expected a path or nothing, found 5"),
    "threads": (["plan", "RUN", "cpu_infer=99999999999"], "cpu_infer: expected at most 2147483647"),
    "trust": (["plan", "RUN", "trust_remote_code='no'"], "trust_remote_code: expected true or false, found 'no'"),
    "500 unknown keys": (["plan", "RUN", *(f"key{i}=1" for i in range(500))], "500 faults .* and 480 more"),
    "a name of a run": (["plan", "x" * 5000], "File name too long"),
    "a name with a line break": (["plan", "a\nb.yaml"], r"a\\nb.yaml: run configuration"),
}


@pytest.mark.parametrize("fault", COMMANDS)
def test_words_of_the_command_line(model, tmp_path, fault):
    words, match = COMMANDS[fault]
    run = tmp_path / "run.yaml"
    run.write_text(f"model_name_or_path: {model}\nuse_kt: true\nuse_cpu: true\n")
    result = CliRunner().invoke(app, [str(run) if word == "RUN" else word for word in words])
    assert result.exit_code == 2, result.output
    assert len(result.output.strip().splitlines()) == 1 and len(result.output) < 9000
    assert re.search(match, result.output), result.output


@pytest.mark.parametrize(
    "words",
    [
        ["plan", ""],
        ["convert", "--input-path", "x", "--output", ""],
        ["convert", "--input-path", " ", "--output", "x"],
        ["merge", "--adapter", "x", "--output", ""],
        ["merge", "--adapter", "", "--output", "x"],
        ["adapter", "convert", "--to", "vllm", "x", ""],
        ["adapter", "inspect", ""],
    ],
    ids=lambda words: " ".join(words),
)
def test_an_empty_path_is_not_the_current_directory(words):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "found an empty string" in " ".join(result.output.split())


def test_tokenizers_that_are_damaged(model):
    from kt_sft.integrations.gguf.tokenizer_writer import tokenizer_metadata

    for text in ('{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": [["x", "y"]]}}', "{", "[]"):
        (model / "tokenizer.json").write_text(text)
        (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        try:
            refused(
                lambda: tokenizer_metadata(model, 131), "tokenizer: expected what transformers takes, found", "base"
            )
        finally:
            (model / "tokenizer.json").unlink()
            (model / "tokenizer_config.json").unlink()


def test_run_files_are_looked_at_before_omegaconf_reads_them(tmp_path, monkeypatch):
    """Its tree of lists in lists ends the process, and a pipe keeps it waiting."""
    parser = pytest.importorskip("llamafactory.hparams.parser")
    from kt_sft.integrations.llamafactory import parsing

    for name in ("read_args", *parsing._GETTERS):
        monkeypatch.setattr(parser, name, getattr(parser, name))
    parsing.patch_parser(parser)
    (tmp_path / "deep.yaml").write_text("[" * 200_000)
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, match in (("deep.yaml", "more than 32 levels"), ("pipe.yaml", "found a pipe")):
        monkeypatch.setattr(sys, "argv", ["llamafactory-cli", str(tmp_path / name)])
        with pytest.raises(FormatError, match=match):
            parser.read_args()


def test_environment_numbers_that_only_look_like_some(monkeypatch):
    from kt_sft import env

    monkeypatch.setenv("KT_SFT_THREADS", "²")
    with pytest.raises(ConfigError, match="KT_SFT_THREADS: expected a whole number"):
        env.threads()
    monkeypatch.setenv("LOCAL_RANK", "²")
    assert env.local_rank() == 0


def test_values_of_a_config_object(tmp_path):
    config = tiny_models.config("qwen3_moe")
    config.num_hidden_layers = 10**9
    with pytest.raises(FormatError, match="num_hidden_layers: expected a whole number"):
        kt_sft.integrations.transformers.model_files.meta_model(config)
    with pytest.raises(UnsupportedModel, match="unknown/model: expected the config of a known model"):
        kt_sft.models.auto_class.read_auto_config("unknown/model", local_files_only=True)
