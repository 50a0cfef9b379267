"""What checks before the data have opened is what LLaMA-Factory loads: each header once, again where a file changed."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import gguf_models, tiny_models
from tests.helpers.llamafactory_runs import drive, environment, infer_config, train_config, workspace
from tests.helpers.tiny_tokenizer import VOCAB_SIZE, save_tiny_tokenizer

SCRIPT = """
import gc
from pathlib import Path
from llamafactory.hparams import get_infer_args, get_train_args
from llamafactory.model import loader
from llamafactory.train.trainer_utils import create_ref_model
from safetensors.torch import load_file, save_file
from kt_sft.formats.gguf import GgufIndex
from kt_sft.models.spec import iter_routed_experts
from tests.helpers.header_reads import counted

root, runs, export, changed = given
root = Path(root)

def load(config, parse=get_train_args, change=None):
    with counted(root) as counts:
        groups = parse(config)
        model_args, finetuning_args = groups[0], next(g for g in groups if hasattr(g, "lora_target"))
        if change is not None:
            file = Path(change) / "model.safetensors"
            save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
        tokenizer = loader.load_tokenizer(model_args)["tokenizer"]
        trains = parse is get_train_args
        model = loader.load_model(tokenizer, model_args, finetuning_args, is_trainable=trains)
        if trains and finetuning_args.ref_model:
            create_ref_model(model_args, finetuning_args)
    headers = {name: count for name, count in counts.items() if "token" not in name}
    return headers, model

answers = {name: load(config)[0] for name, config in runs.items()}
gc.collect()
answers["kept"] = sum(isinstance(o, GgufIndex) for o in gc.get_objects())
answers["export"] = load(export, get_infer_args)[0]
_, model = load(changed, change=changed["model_name_or_path"])
name, experts = next(iter_routed_experts(model))
answers["changed"] = experts.unpack_expert(1)[2].float().tolist()
give(answers)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = workspace(tmp_path_factory.mktemp("opened")).resolve()
    sizes = {"vocab_size": VOCAB_SIZE + 5, "max_position_embeddings": 512}
    for name in ("other", "changing"):
        save_tiny_tokenizer(tiny_models.build("qwen3_moe", root / name, seed=3, **sizes))
    gguf_models.write_model(root / "other", root / "other.gguf")
    return root


@pytest.fixture(scope="module")
def answers(root):
    runs = {
        "plain": train_config(root, "out"),
        "reference": train_config(root, "out", stage="dpo", ref_model=str(root / "other")),
        "gguf": train_config(root, "out", stage="dpo", ref_model=str(root / "other.gguf")),
        "same": train_config(root, "out", stage="dpo", ref_model=str(root / "model")),
    }
    export = infer_config(root, export_dir=str(root / "exported"))
    changing = train_config(root, "out", model_name_or_path=str(root / "changing"))
    return drive(SCRIPT, str(root), runs, export, changing, env=environment(HOME=str(root / "home")))


def of(folder):
    return {f"{folder}/{name}": 1 for name in ("config.json", "model.safetensors")}


def test_policy_is_opened_once(root, answers):
    found = {name: count for name, count in answers["plain"].items() if name.startswith(("model/", "meta"))}
    assert {name: found[name] for name in of("model")} == of("model") and found["meta models"] == 1
    assert max(found.values()) == 1


@pytest.mark.parametrize(("run", "files"), [("reference", of("other")), ("gguf", {"other.gguf": 1})])
def test_reference_is_opened_once(answers, run, files):
    found = answers[run]
    assert {name: found[name] for name in files} == files
    assert {name: found[name] for name in of("model")} == of("model") and found["meta models"] == 2


def test_a_policy_that_is_its_own_reference_is_opened_for_both(answers):
    found = answers["same"]
    assert {name: found[name] for name in of("model")} == {name: 2 for name in of("model")}
    assert found["meta models"] == 2


def test_headers_of_a_gguf_file_are_not_kept_after_the_loads(answers):
    assert answers["kept"] == 0


def test_export_opens_the_checkpoint_once(answers):
    found = answers["export"]
    assert {name: found[name] for name in of("model")} == of("model") and found["meta models"] == 1


def test_files_that_change_after_the_checks_are_seen(root, answers):
    stock = tiny_models.load_stock(root / "changing")
    expected = stock.model.layers[0].mlp.experts.down_proj[1]
    assert torch.equal(torch.tensor(answers["changed"]), expected.float())
