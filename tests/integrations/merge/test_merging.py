"""Merged checkpoints: every number against W + delta, for stock transformers and as GGUF files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import kt_sft
from kt_sft.cli import app
from kt_sft.errors import ConfigError, FormatError, UnsupportedModel
from kt_sft.formats.gguf import GgufIndex
from kt_sft.integrations.gguf.tokenizer import read_tokenizer
from kt_sft.integrations.gguf.tokenizer_writer import tokenizer_metadata
from kt_sft.integrations.merge.checkpoint import MergedCheckpoint
from kt_sft.integrations.merge.command import merge as merge_checkpoint
from kt_sft.integrations.transformers.opened import OpenedModel
from scripts.demo.tiny_moe.gguf_source import find_gguf
from tests.helpers import adapters, gguf_files, gguf_models, quantized_checkpoints, tiny_models
from tests.helpers.tolerance import rel_l2

FAMILIES = (*tiny_models.FAMILIES, "gpt_oss")
SIZES = {  # whole blocks of 32 in every row
    "mixtral": {"hidden_size": 64, "intermediate_size": 32},
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4, "head_dim": 16},
    "deepseek_v2": {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64},
    "deepseek_v3": {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64},
}


def add_tokenizer(base: Path) -> None:
    """That of a tiny GGUF file."""
    values = gguf_models.tokenizer(json.loads((base / "config.json").read_text())["vocab_size"])
    file = gguf_files.write(base / "t.gguf", values, {"x": gguf_files.random_blocks("F32", (3,))})
    read_tokenizer(GgufIndex.from_path(file)).save_pretrained(base)
    file.unlink()


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            adapters.make(family, made[family], sharded=True, **SIZES.get(family, {}))
            add_tokenizer(made[family] / "base")
        return made[family]

    return of


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["merge", *(str(word) for word in words)])
    return result.exit_code, result.output


def merge(root: Path, output: Path, to: str = "hf", adapter: Path | None = None) -> Path:
    code, text = run("--adapter", adapter or root / "adapter", "--output", output, "--to", to)
    assert code == 0, text
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_hf_checkpoint_is_w_plus_delta_rounded_once(roots, tmp_path, family):
    root = roots(family)
    folder = merge(root, tmp_path / "merged")
    before, after = weights(root / "base"), weights(folder)
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    files = [{path.name for path in d.iterdir()} for d in (root / "base", folder)]
    assert files[0] == files[1] and len(list(folder.glob("*.safetensors"))) > 1
    stock, merged = tiny_models.load_stock(root / "base"), tiny_models.load_stock(folder)
    deltas, found = adapters.peft_deltas(root), dict(merged.named_parameters())
    for name, weight in stock.named_parameters():
        exact = weight.double() + deltas.get(name, 0.0)
        error = (found[name].double() - exact).abs()
        assert (error <= exact.abs() * 2**-8 + 1e-6).all(), name  # half a unit of bf16, and f32 sums that cancel
        assert name in deltas or not error.any()
    ids = tiny_models.token_ids()
    wanted, logits = adapters.peft_model(root)(ids).logits, merged(ids).logits
    base = stock(ids).logits
    assert (logits - wanted).norm() < 0.05 * (base - wanted).norm()


def test_types_that_no_weight_has_are_copied(tmp_path):
    """Buffers of whole numbers bit by bit, and a weight in f64 with its delta."""
    adapters.make("qwen3_moe", tmp_path)
    name, file = "model.layers.0.self_attn.q_proj.weight", tmp_path / "base" / "model.safetensors"
    before = weights(tmp_path / "base")
    before[name] = before[name].double() + 1e-9
    before |= {"model.position_ids": torch.arange(2000), "model.mask": torch.tensor([True, False])}
    before |= {"model.scale": torch.tensor([1.5, -3.0]).to(torch.float8_e5m2), "model.wave": torch.tensor([1 + 2j])}
    save_file(before, file, {"format": "pt"})
    after, deltas = weights(merge(tmp_path, tmp_path / "merged")), adapters.peft_deltas(tmp_path)
    assert {key: tensor.dtype for key, tensor in after.items()} == {key: t.dtype for key, t in before.items()}
    for key in ("model.position_ids", "model.mask", "model.scale", "model.wave"):
        assert torch.equal(after[key].view(torch.uint8), before[key].view(torch.uint8)), key
    assert (after[name] - (before[name] + deltas[name])).abs().max() < 1e-7 * deltas[name].abs().max() + 1e-12


@pytest.mark.parametrize("whole", [False, True], ids=["lora", "modules_to_save"])
def test_head_that_was_the_embedding_gets_its_own_weight(roots, tmp_path, whole):
    """A checkpoint that stores it, the same as the embedding, beside a config that ties the two."""
    root = shutil.copytree(roots("mixtral"), tmp_path / "root")
    embedding = weights(root / "base")["model.embed_tokens.weight"]
    for file in (root / "base").glob("*.safetensors"):
        tensors = load_file(file)
        if "lm_head.weight" in tensors:
            save_file({**tensors, "lm_head.weight": embedding.clone()}, file, {"format": "pt"})
    config = root / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    head = weights(root / "base")["lm_head.weight"]
    a, b = torch.full((3, head.shape[1]), 0.25), torch.full((head.shape[0], 3), 0.5)
    stem, wanted = "base_model.model.lm_head.", 2 * head
    trained = {f"{stem}weight": wanted}
    if not whole:
        trained = {f"{stem}lora_A.weight": a, f"{stem}lora_B.weight": b}
        wanted = (head.float() + 5 / 3 * b @ a).bfloat16()
    adapters.damaged(lambda tensors: {**tensors, **trained})(root / "adapter")
    targets = json.loads((root / "adapter" / "adapter_config.json").read_text())["target_modules"]
    named = {"modules_to_save": ["lm_head"]} if whole else {"target_modules": [*targets, "lm_head"]}
    adapters.edit(root / "adapter", base_model_name_or_path=str(root / "base"), **named)
    folder = merge(root, tmp_path / "merged")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(tiny_models.load_stock(folder).lm_head.weight, wanted.float())
    index = GgufIndex.from_path(merge(root, tmp_path / "m.gguf", "gguf-bf16"))
    assert torch.equal(index.read("output.weight"), wanted.float())
    adapters.damaged(lambda tensors: {n: t for n, t in tensors.items() if "lm_head" not in n})(root / "adapter")
    adapters.edit(root / "adapter", modules_to_save=None, target_modules=targets)
    assert "output.weight" not in GgufIndex.from_path(merge(root, tmp_path / "tied.gguf", "gguf-bf16"))


def test_several_adapters_are_added(roots, tmp_path):
    root = roots("mixtral")
    code, text = run("--adapter", root / "adapter", "--adapter", root / "adapter", "--output", tmp_path / "twice")
    assert code == 0, text
    base, deltas = weights(root / "base"), adapters.peft_deltas(root)
    name = "model.layers.0.self_attn.q_proj.weight"
    wanted = (base[name].double() + 2 * deltas[name]).to(torch.bfloat16)
    assert torch.allclose(weights(tmp_path / "twice")[name].float(), wanted.float(), rtol=2**-7)


def test_quantised_base_becomes_bf16(roots, tmp_path):
    root = roots("deepseek_v3")
    fp8, plain = quantized_checkpoints.fp8_checkpoint(root / "base", tmp_path / "fp8")
    merged = {}
    for folder in (fp8, plain):
        target = tmp_path / f"{folder.name}-merged"
        code, text = run("--model", folder, "--adapter", root / "adapter", "--output", target)
        assert code == 0, text
        merged[folder] = weights(target)
        assert "quantization_config" not in json.loads((target / "config.json").read_text())
    assert merged[fp8].keys() == merged[plain].keys()
    for name, tensor in merged[fp8].items():
        assert torch.equal(tensor, merged[plain][name].to(tensor.dtype)), name


@pytest.mark.parametrize("family", SIZES)
def test_gguf_bf16_is_the_merged_checkpoint(roots, tmp_path, family):
    root = roots(family)
    folder = merge(root, tmp_path / "merged")
    file = merge(root, tmp_path / "m.gguf", "gguf-bf16")
    ours = kt_sft.load_model(file, kt_sft.KTConfig(weight_cache=str(tmp_path / "cache")))
    wanted = kt_sft.load_model(folder)
    parameters = dict(wanted.named_parameters())
    for name, parameter in ours.named_parameters():
        # The router stays f32 in the file: its sum with a delta is rounded only when it is read.
        assert torch.equal(parameter, parameters[name]), name
    ids = tiny_models.token_ids()
    assert torch.equal(ours(ids).logits, wanted(ids).logits)


@pytest.mark.parametrize("family", SIZES)
def test_gguf_q8_0_blocks_are_ggmls(roots, tmp_path, family):
    root = roots(family)
    file = merge(root, tmp_path / "m.gguf", "gguf-q8_0")
    merged = MergedCheckpoint(OpenedModel(root / "base"), [root / "adapter"])
    index = GgufIndex.from_path(file)
    for module in merged.base.specs:
        layer = module.split(".")[2]
        for projection in ("gate", "up", "down"):
            name = f"blk.{layer}.ffn_{projection}_exps.weight"
            for expert in range(merged.base.specs[module].num_experts):
                exact = merged.matrix(module, expert, projection).float().numpy()
                wanted = quantize(exact, GGMLQuantizationType.Q8_0)
                assert np.array_equal(index.blocks(name, (expert,)).numpy(), wanted.view(np.uint8)), name
    kinds = {name: index.info(name).type.name for name in index}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert {kinds[n] for n in kinds if "norm" in n or n.endswith(("ffn_gate_inp.weight", "exp_probs_b.bias"))} == {
        "F32"
    }
    ours = kt_sft.load_model(file, kt_sft.KTConfig(weight_cache=str(tmp_path / "cache")))
    wanted = dict(kt_sft.load_model(merge(root, tmp_path / "merged")).named_parameters())
    for name, parameter in ours.named_parameters():  # a block of Q8_0 is off by half of 1 / 127 of its largest at most
        assert rel_l2(parameter, wanted[name]) < 2**-6, name


def test_widths_that_are_no_whole_blocks_stay_bf16(tmp_path):
    adapters.make("qwen3_moe", tmp_path)
    add_tokenizer(tmp_path / "base")
    index = GgufIndex.from_path(merge(tmp_path, tmp_path / "m.gguf", "gguf-q8_0"))
    assert index.info("blk.0.ffn_down_exps.weight").type.name == "BF16"


TEXTS = (
    "The capital of France is Paris.",
    "x = 12345 + 678\n\n\tfoo()",
    "  größer 你好 'll don't",
    "<|im_start|>user\nhi",
)


def test_tokenizers_survive(tmp_path):
    """A real byte-level one, and one of SentencePiece's kind, through a GGUF file and back."""
    byte_level = read_tokenizer(GgufIndex.from_path(find_gguf()))
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdeho",
        "he",
        "ab",
        "▁he",
        "abe",
    ]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [("h", "e"), ("a", "b"), ("▁", "he"), ("ab", "e")]
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    sentence_piece = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    for number, tokenizer in enumerate((byte_level, sentence_piece)):
        tokenizer.save_pretrained(tmp_path / str(number))
        size = len(tokenizer) + 3
        values = tokenizer_metadata(tmp_path / str(number), size)
        file = tmp_path / f"{number}.gguf"
        from kt_sft.formats.gguf_writer import PlannedGguf, write

        write(file, values, [PlannedGguf("x", "F32", (1,))], [[torch.zeros(4, dtype=torch.uint8)]])
        again = read_tokenizer(GgufIndex.from_path(file))
        assert len(values["tokenizer.ggml.tokens"]) == size
        for text in (*TEXTS, "he abe hehe  ab"):
            assert again(text).input_ids == tokenizer(text).input_ids, text
        assert again.eos_token == tokenizer.eos_token and again.chat_template == tokenizer.chat_template


def test_what_cannot_be_merged_is_said_before_anything_is_written(roots, tmp_path):
    root = roots("gpt_oss")
    output = tmp_path / "out"
    cases = [
        (UnsupportedModel, "found model type gpt_oss", (root / "base", [root / "adapter"], output, "gguf-bf16")),
        (ConfigError, "expected hf, gguf-q8_0 or gguf-bf16", (root / "base", [root / "adapter"], output, "q4")),
        (ConfigError, "expected a directory", (tmp_path / "x.gguf", [root / "adapter"], output, "hf")),
        (FormatError, "trained on another model type", (roots("mixtral") / "base", [root / "adapter"], output, "hf")),
    ]
    for error, match, words in cases:
        with pytest.raises(error, match=match):
            merge_checkpoint(*words, bar=None)
        assert not list(tmp_path.iterdir())
    code, text = run("--adapter", roots("mixtral") / "adapter", "--output", roots("mixtral") / "base")
    assert code == 2 and "expected a new path, found something there" in text
    assert AutoTokenizer.from_pretrained(roots("mixtral") / "base")


MEMORY = """
import contextlib, sys, threading, time
from pathlib import Path
from kt_sft.integrations.merge.checkpoint import MergedCheckpoint
from kt_sft.integrations.merge.command import merge as merge_checkpoint

def anonymous():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

@contextlib.contextmanager
def bar(what, total):
    peak, done = [anonymous()], threading.Event()
    before = peak[0]

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    yield lambda *_: None
    done.set()
    thread.join()
    print(peak[0] - before)

base, adapter, output, to = sys.argv[1:]
merge_checkpoint(base, [adapter], Path(output), to, bar)
"""


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "gguf-q8_0"])
def test_memory_does_not_grow_with_the_model(tmp_path, to):
    """A checkpoint of 200 MiB, a tensor of it 1 MiB, an expert layer's factors 3 MiB."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 16, "num_hidden_layers": 4}
    adapters.make("mixtral", tmp_path, **sizes)
    add_tokenizer(tmp_path / "base")
    size = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    words = [tmp_path / "base", tmp_path / "adapter", tmp_path / "out.gguf", to]
    command = [sys.executable, "-c", MEMORY, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    assert size > 180 << 20 and int(done.stdout) < 48 << 20, f"{int(done.stdout) >> 20} MiB of {size >> 20}"
