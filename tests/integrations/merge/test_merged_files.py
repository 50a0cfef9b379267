"""What `write_merged` makes of dtypes, of sizes of shards and of several adapters."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kt_sft.integrations.merge.checkpoint import MergedCheckpoint
from kt_sft.integrations.merge.safetensors import write_merged
from kt_sft.integrations.transformers.opened import OpenedModel
from tests.helpers import adapters, tiny_models


@contextlib.contextmanager
def bar(what: str, total: int):
    yield lambda done, count, name: None


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepseek")
    adapters.make("deepseek_v3", folder)
    biases = [name for name in weights(folder / "base") if name.endswith("e_score_correction_bias")]
    assert biases
    generator = torch.Generator().manual_seed(0)
    # No bf16 numbers, and f32 as in the published checkpoints.
    noise = {name: torch.randn(weights(folder / "base")[name].shape, generator=generator) for name in biases}
    tiny_models.rewrite(folder / "base", lambda tensors: {**tensors, **noise})
    return folder


def test_written_dtype_is_in_the_config_and_routing_biases_stay_f32(root, tmp_path):
    merged = MergedCheckpoint(OpenedModel(root / "base"), [root / "adapter"])
    (tmp_path / "out").mkdir()
    write_merged(merged, tmp_path / "out", bar, dtype=torch.float16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {"float16"}
    before, after = weights(root / "base"), weights(tmp_path / "out")
    biases = [name for name in after if name.endswith("e_score_correction_bias")]
    assert biases and all(torch.equal(after[name], before[name]) for name in biases)
    assert {after[name].dtype for name in after if name not in biases} == {torch.float16}


def test_shards_are_as_large_as_asked(root, tmp_path):
    limit = 20_000
    merged = MergedCheckpoint(OpenedModel(root / "base"), [root / "adapter"])
    (tmp_path / "out").mkdir()
    write_merged(merged, tmp_path / "out", bar, limit_bytes=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    for file in files:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            sizes = [tensors.get_tensor(name).nbytes for name in names]
        assert sum(sizes) <= limit or len(sizes) == 1, (file.name, sizes)
        assert all(index[name] == file.name for name in names)
    assert index.keys() == weights(root / "base").keys()
    ids = tiny_models.token_ids()
    base, found = (tiny_models.load_stock(folder)(ids).logits for folder in (root / "base", tmp_path / "out"))
    wanted = adapters.peft_model(root)(ids).logits
    assert (found - wanted).norm() < 0.05 * (base - wanted).norm()


def test_experts_get_the_sum_of_several_adapters(root, tmp_path):
    base = weights(root / "base")
    merged = MergedCheckpoint(OpenedModel(root / "base"), [root / "adapter", root / "adapter"])
    once = adapters.deltas(merged.adapters[0])
    (tmp_path / "out").mkdir()
    write_merged(merged, tmp_path / "out", bar)
    after = weights(tmp_path / "out")
    seen = 0
    for module, spec in merged.base.specs.items():
        for index in range(spec.num_experts):
            parts = {
                "gate_proj": once[f"{module}.gate_up_proj"][index][spec.gate_rows],
                "up_proj": once[f"{module}.gate_up_proj"][index][spec.up_rows],
                "down_proj": once[f"{module}.down_proj"][index],
            }
            for name, delta in parts.items():
                key = f"{module}.{index}.{name}.weight"
                exact = base[key].double() + 2 * delta
                assert ((after[key].double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all(), key
                seen += 1
    assert seen == 3 * sum(spec.num_experts for spec in merged.base.specs.values())


def test_head_that_is_no_longer_the_embedding_is_not_called_tied(tmp_path):
    adapters.make("mixtral", tmp_path, tie_word_embeddings=True)
    head = weights(tmp_path / "base")["model.embed_tokens.weight"]
    stem = "base_model.model.lm_head.lora_"
    factors = {f"{stem}A.weight": torch.ones(3, head.shape[1]), f"{stem}B.weight": torch.ones(head.shape[0], 3)}
    for name, added, is_tied in (("plain", {}, True), ("head", factors, False)):
        adapters.damaged(lambda tensors, added=added: {**tensors, **added})(tmp_path / "adapter")
        if added:
            targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
            adapters.edit(tmp_path / "adapter", target_modules=[*targets, "lm_head"])
        merged = MergedCheckpoint(OpenedModel(tmp_path / "base"), [tmp_path / "adapter"])
        (tmp_path / name).mkdir()
        write_merged(merged, tmp_path / name, bar)
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is is_tied
        assert ("lm_head.weight" in weights(tmp_path / name)) is not is_tied
