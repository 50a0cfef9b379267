"""A GGUF file as the only model file: the same model as the checkpoint that it was made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer

import kt_sft
from kt_sft import KTConfig
from kt_sft.errors import FormatError, UnsupportedModel
from kt_sft.formats.gguf import GgufIndex
from kt_sft.integrations.gguf import model as gguf_model
from kt_sft.integrations.gguf.tokenizer import read_tokenizer
from kt_sft.integrations.transformers.converting import open_source
from kt_sft.models.spec import iter_routed_experts
from scripts.demo.tiny_moe.gguf_source import find_gguf
from scripts.demo.tiny_moe.tokenizer import build_tokenizer
from tests.helpers import gguf_files, gguf_models, tiny_models
from tests.helpers.tolerance import rel_l2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    return tmp_path / "home" / ".cache" / "kt_sft" / "gguf"


CASES = [("qwen3_moe", False), ("mixtral", False), ("deepseek_v2", False), ("deepseek_v2", True), ("deepseek_v3", True)]


@pytest.mark.parametrize(("family", "split_kv_b"), CASES, ids=[f"{f}{' split kv_b' * s}" for f, s in CASES])
def test_same_model_as_the_checkpoint(tmp_path, cache, family, split_kv_b):
    plain = tiny_models.build(family, tmp_path / "plain")
    file = gguf_models.write_model(plain, tmp_path / "model.gguf", split_kv_b=split_kv_b)
    ours, wanted = kt_sft.load_model(file), kt_sft.load_model(plain)
    parameters = dict(wanted.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
    ids = tiny_models.token_ids()
    assert torch.equal(ours(ids).logits, wanted(ids).logits)
    (folder,) = cache.iterdir()
    assert not [path for path in folder.iterdir() if path.stat().st_size > 1 << 20]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("ab c!").input_ids) == "ab c!"
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab c!").input_ids) == ["ab", "Ġc", "!"]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "</s>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_directory_is_made_once_and_again_for_a_changed_file(tmp_path, cache, monkeypatch):
    plain = tiny_models.build("mixtral", tmp_path / "plain")
    file = gguf_models.write_model(plain, tmp_path / "model.gguf")
    first = gguf_model.model_directory(GgufIndex.from_path(file))
    monkeypatch.setattr(gguf_model, "write", None)  # writing again would fail
    assert gguf_model.model_directory(GgufIndex.from_path(file)) == first
    monkeypatch.undo()
    file.write_bytes(file.read_bytes() + b"\0" * 32)
    assert gguf_model.model_directory(GgufIndex.from_path(file), tmp_path / "own").parent == tmp_path / "own"


def test_trains_with_quantised_experts(tmp_path):
    plain = tiny_models.build("deepseek_v2", tmp_path / "plain", hidden_size=64, moe_intermediate_size=32)
    file = gguf_models.write_model(plain, tmp_path / "model.gguf", kind="Q8_0")
    model = kt_sft.load_model(file, KTConfig(method="INT8"), dtype=torch.float32)
    stock = tiny_models.load_stock(plain)
    parameters = dict(stock.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" not in name.split("."):
                parameters[name].copy_(parameter)
        for name, experts in iter_routed_experts(model):
            parts = [experts.unpack_expert(index) for index in range(experts.num_experts)]
            for index, (gate, up, down) in enumerate(parts):
                parameters[f"{name}.gate_up_proj"][index] = torch.cat([gate, up])
                parameters[f"{name}.down_proj"][index] = down
    ids = tiny_models.token_ids()
    losses = [m(ids, labels=ids).loss for m in (model, stock)]
    for loss in losses:
        loss.backward()
    assert abs(losses[0] - losses[1]) <= 2**-7 * losses[1]
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert "model.embed_tokens.weight" in trained and len(trained) > 15
    for name, gradient in trained.items():
        assert rel_l2(gradient, parameters[name].grad) <= 0.03, name


def contents(file):
    """Metadata and tensors of a file, as `gguf_files.write` takes them."""
    index = GgufIndex.from_path(file)
    tensors = {
        name: (info.type.name, info.shape, index.blocks(name).numpy().reshape(-1).copy())
        for name, info in ((name, index.info(name)) for name in index)
    }
    return {key: v.tolist() if hasattr(v, "tolist") else v for key, v in index.metadata.items()}, tensors


def test_kv_b_whole_and_in_halves(tmp_path):
    """Files of some months of llama.cpp have both; halves alone have to be what they are taken for."""
    plain = tiny_models.build("deepseek_v3", tmp_path / "plain")
    _, whole = contents(gguf_models.write_model(plain, tmp_path / "whole.gguf"))
    metadata, halves = contents(gguf_models.write_model(plain, tmp_path / "halves.gguf", split_kv_b=True))
    both = gguf_files.write(tmp_path / "both.gguf", metadata, halves | whole)
    ours, wanted = kt_sft.load_model(both), kt_sft.load_model(plain)
    parameters = dict(wanted.named_parameters())
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in ours.named_parameters())
    for name in ("blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight"):
        kind, shape, data = halves[name]
        flat = {name: (kind, (shape[0] * shape[1], shape[2]), data)}
        gguf_files.write(both, metadata, halves | flat)
        refused(both, f"tensor {name}: expected three axes, heads first, found")


def refused(file, match, error=FormatError):
    with pytest.raises(error, match=match) as caught:
        kt_sft.load_model(file)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_such_model(tmp_path, cache):
    file = tmp_path / "m.gguf"
    gguf_files.write(file, {"general.architecture": "gemma"}, {"x": gguf_files.random_blocks("F32", (3,))})
    refused(file, "general.architecture: expected qwen3moe, llama, deepseek2 .* found 'gemma'", UnsupportedModel)
    gguf_files.write(file, {"general.architecture": "llama"}, {"x": gguf_files.random_blocks("F32", (3,))})
    refused(file, "expected a mixture of experts, found a dense model", UnsupportedModel)
    refused(tmp_path / "none.gguf", "GGUF file: expected a file, found nothing")
    plain = tiny_models.build("mixtral", tmp_path / "plain")
    gguf_models.write_model(plain, file)
    metadata, tensors = contents(file)

    def rewritten(match, error=FormatError, change=None, **tensor):
        gguf_files.write(file, metadata | (change or {}), {**tensors, **tensor} if tensor else tensors)
        refused(file, match, error)

    rewritten("metadata llama.block_count: expected one whole number, found x", change={"llama.block_count": "x"})
    rewritten("found 'strange'", UnsupportedModel, change={"tokenizer.ggml.pre": "strange"})
    rewritten("tokenizer.ggml.merges: expected a list of texts", change={"tokenizer.ggml.merges": 3})
    rewritten("merges: expected pairs of tokens .* found 'zz q'", change={"tokenizer.ggml.merges": ["a b", "zz q"]})
    rewritten("token_type: expected 131 numbers.* found 3 values", change={"tokenizer.ggml.token_type": [3, 3, 3]})
    rewritten("token_type: expected 131 numbers", change={"tokenizer.ggml.token_type": ["x"] * 131})
    rewritten("eos_token_id: expected a token from 0 to 130, .* found 131", change={"tokenizer.ggml.eos_token_id": 131})
    spare = gguf_files.random_blocks("F32", (3,))
    rewritten("tensor rope_freqs.weight: expected tensors of", UnsupportedModel, **{"rope_freqs.weight": spare})
    rewritten(r"expected shape \[56\], found \[3\]", **{"output_norm.weight": spare})
    tensors.pop("blk.1.attn_v.weight")
    rewritten("expected every weight of the model, found 1 missing, first that of model.layers.1.self_attn.v_proj")
    assert not cache.exists() or not list(cache.iterdir())
    assert json.loads((plain / "config.json").read_text())["model_type"] == "mixtral"


TEXTS = (
    "The capital of France is Paris.",
    "x = 12345 + 678\n\n\tfoo()",
    "  größer 你好 'll don't",
    "<|im_start|>user\nhi",
)


def test_tokenizer_of_a_real_file():
    """SmolLM2's tokenizer as the demo builds it from its own knowledge of the model."""
    index = GgufIndex.from_path(find_gguf())
    ours, theirs = read_tokenizer(index), build_tokenizer(index.metadata)
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == text


@pytest.mark.parametrize(
    ("pre", "add_bos", "begins"), [("llama-bpe", None, True), ("llama3", False, False), ("qwen2", None, False)]
)
def test_first_token_where_the_file_says_nothing_of_it(tmp_path, pre, add_bos, begins):
    """As llama.cpp does it."""
    metadata = gguf_models.tokenizer(131) | {"tokenizer.ggml.pre": pre}
    metadata |= {} if add_bos is None else {"tokenizer.ggml.add_bos_token": add_bos}
    file = gguf_files.write(tmp_path / "t.gguf", metadata, {"x": gguf_files.random_blocks("F32", (3,))})
    ids = read_tokenizer(GgufIndex.from_path(file))("ab").input_ids
    assert ids == ([1] if begins else []) + [5]


def test_sentence_piece_tokenizer(tmp_path):
    """Merges are not in the file; what is built from the scores cuts text as sentencepiece does."""
    words = " ".join(Path(gguf_model.__file__).read_text().split())
    (tmp_path / "text").write_text("\n".join(words[i : i + 500] for i in range(0, len(words), 500)))
    settings = {"model_type": "bpe", "vocab_size": 500, "byte_fallback": True, "minloglevel": 2}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(input=tmp_path / "text", model_prefix=tmp_path / "m", **settings)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    ids = range(model.vocab_size())
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [float(model.get_score(i)) for i in ids],
        "tokenizer.ggml.token_type": [3 if model.is_control(i) else 2 if i == 0 else 1 for i in ids],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    file = gguf_files.write(tmp_path / "m.gguf", metadata, {"x": gguf_files.random_blocks("F32", (3,))})
    tokenizer = read_tokenizer(GgufIndex.from_path(file))
    for text in (*TEXTS[:3], words[:3000]):
        assert tokenizer(text).input_ids == [1, *model.encode(text)], text
        assert tokenizer.decode(model.encode(text)) == text


def test_converting_a_lone_file(tmp_path):
    plain = tiny_models.build("deepseek_v2", tmp_path / "plain")
    file = gguf_models.write_model(plain, tmp_path / "model.gguf")
    source, specs, model_type = open_source(file, "gguf")
    wanted, others, _ = open_source(plain)
    assert (model_type, specs) == ("deepseek_v2", others)
    for name in specs:
        for mine, other in zip(source.read(name, 3), wanted.read(name, 3), strict=True):
            assert torch.equal(mine, other)


def test_converting_a_folder_of_config_and_gguf_weights(tmp_path):
    plain = tiny_models.build("deepseek_v2", tmp_path / "plain")
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copyfile(plain / "config.json", folder / "config.json")
    gguf_models.write_model(plain, folder / "model.gguf")
    source, specs, _ = open_source(folder, "gguf")
    assert source.kind == "gguf" and specs == open_source(plain)[1]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_converting_a_file_that_is_no_checkpoint(tmp_path, name):
    plain = tiny_models.build("deepseek_v2", tmp_path / "plain")
    with pytest.raises(FormatError, match=f"{name}: checkpoint: expected a checkpoint directory or a GGUF file"):
        open_source(plain / name)
