"""One mapped container for several groups of threads: the model is the one whose experts are copied, without a copy."""

from __future__ import annotations

import logging

import pytest
import torch

import kt_sft
from kt_sft import KTConfig
from kt_sft.models.spec import iter_routed_experts
from kt_sft.native import native
from tests.helpers import tiny_models
from tests.sources.test_containers import convert

INTER, HIDDEN, POOLS = 200, 48, 3  # four units of 64 columns in three shards, the last of which ends inside a tile


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_models.build(
        "mixtral", tmp_path_factory.mktemp("shards") / "model", intermediate_size=INTER, hidden_size=HIDDEN
    )


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    root, made = tmp_path_factory.mktemp("containers"), {}

    def get(method):
        if method not in made:
            made[method] = root / method
            convert(source, made[method], method)
        return made[method]

    return get


@pytest.fixture
def several_pools(monkeypatch):
    """Models are loaded as on a machine of several NUMA nodes."""
    library = native()
    before, real = (library.num_threads(), library.num_pools()), library.set_threads
    monkeypatch.setattr(library, "set_threads", lambda threads, pools: real(POOLS, POOLS, fake_nodes=True))
    yield
    monkeypatch.undo()
    real(*before)


def load(source, method, **settings):
    return kt_sft.load_model(source, KTConfig(method=method, **settings), dtype=torch.bfloat16)


def stores(model):
    return [experts.store for _, experts in iter_routed_experts(model)]


def results(model):
    """Logits as in inference and as in training, and the gradient of the embeddings."""
    ids = tiny_models.token_ids()
    with torch.no_grad():
        answers = [model.eval()(ids).logits]
    model.train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return [*answers, loss.detach(), model.get_input_embeddings().weight.grad]


@pytest.mark.parametrize("method", ["BF16", "INT8", "INT4"])
def test_mapped_shards_equal_copied_ones(source, packed, several_pools, method):
    mapped = load(source, method, weight_path=packed(method), weight_load="mmap")
    copied = load(source, method, weight_path=packed(method), weight_load="copy")
    direct = load(source, method)
    for ours, theirs in zip(stores(mapped), stores(copied), strict=True):
        assert ours.num_shards == theirs.num_shards == POOLS
        assert (ours.mapped_experts, theirs.mapped_experts) == (ours.num_experts, 0)
        sums = ours.num_experts * POOLS * 4 * 64 if method == "INT8" else 0  # of 48 rows of down, in whole panels
        assert ours.own_bytes == sums and theirs.own_bytes == theirs.packed_bytes
    for other in (copied, direct):
        for got, want in zip(results(mapped), results(other), strict=True):
            assert torch.equal(got, want)
        mapped.zero_grad()


def test_auto_copies_to_several_groups_and_says_what_else_there_is(source, packed, several_pools, caplog):
    with caplog.at_level(logging.INFO, "kt_sft"):
        model = load(source, "BF16", weight_path=packed("BF16"))
    assert not any(store.mapped_experts for store in stores(model))
    (line,) = {record.getMessage() for record in caplog.records if "weight_load" in record.getMessage()}
    assert "3 groups of threads" in line and "weight_load: mmap" in line


def test_the_cache_is_mapped_by_several_groups(source, several_pools, tmp_path):
    settings = {"weight_cache": tmp_path / "cache", "weight_load": "mmap"}
    first, second = (load(source, "INT8", **settings) for _ in range(2))
    for model in (first, second):
        assert all(store.mapped_experts == store.num_experts and store.num_shards == POOLS for store in stores(model))
    plain = load(source, "INT8")
    assert torch.equal(results(first)[0], results(plain)[0])


def test_merged_and_saved_experts_come_from_mapped_shards(source, packed, several_pools, tmp_path):
    model = load(source, "BF16", weight_path=packed("BF16"), weight_load="mmap")
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", "BF16")
    assert torch.equal(results(model)[0], results(again)[0])
