"""Runs of LLaMA-Factory against the truth: the same runs without kt_sft, and one process where two have trained.

LLaMA-Factory knows no LoRA on experts. It continues a given adapter that has some, though, and then stock transformers
and stock PEFT train every factor: the same configuration without `use_kt` says what each loss and each factor must be.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import kt_sft
from tests.helpers import adapters
from tests.helpers.llamafactory_runs import cli, drive, environment, train_config, workspace
from tests.helpers.tolerance import rel_l2

RUN = """
from llamafactory.train.tuner import run_exp
for config in given[0]:
    run_exp(config)
give(True)
"""
STEPS = 3
RUNS = {
    "sft": {"do_eval": True, "val_size": 0.25, "compute_accuracy": True, "per_device_eval_batch_size": 3},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "packed": {"packing": True},
    "neat": {"neat_packing": True},
    "pt": {"stage": "pt"},
    "dpo": {"stage": "dpo", "dataset": "pairs"},
    "kto": {"stage": "kto", "dataset": "tagged", "per_device_train_batch_size": 4},
}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 2, "save_steps": 1}
# The kernels round operands to bf16, a relative 2^-9 each time. Measured, losses are off by 0.2 % at most, and factors
# move by gradients that are off by 2 %, 5 % with KTO, whose gradient is a difference of large numbers. One that lacks a
# part, a scale or another process is off by tens of percent.
LOSS_ERROR = 2.0**-7
CHANGE_ERROR = 0.1


def add_data(work: Path) -> None:
    """Pairs for DPO and tagged answers for KTO beside the rows that are there."""
    pairs = [{"instruction": f"add {i} and 1", "input": "", "chosen": f"{i + 1}", "rejected": "no"} for i in range(12)]
    tagged = [{"instruction": f"add {i} and 1", "output": f"{i + i % 2}", "good": i % 2 == 1} for i in range(12)]
    info = {
        "sums": {"file_name": "sums.json"},
        "pairs": {
            "file_name": "pairs.json",
            "ranking": True,
            "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"},
        },
        "tagged": {
            "file_name": "tagged.json",
            "columns": {"prompt": "instruction", "response": "output", "kto_tag": "good"},
        },
    }
    for name, content in (("pairs", pairs), ("tagged", tagged), ("dataset_info", info)):
        (work / "data" / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    directory = workspace(tmp_path_factory.mktemp("truth"))
    add_data(directory)
    file = directory / "model" / "config.json"
    values = json.loads(file.read_text())
    # All experts for every token, for near ties of the router would part the two; stock code's grouped_mm, which wants
    # rows of whole 16 bytes, is left out.
    values |= {"num_experts_per_tok": values["num_local_experts"], "experts_implementation": "eager"}
    file.write_text(json.dumps(values))
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = kt_sft.get_peft_model(kt_sft.load_model(directory / "model"), config)
    adapters.randomise(model, seed=3)
    model.save_pretrained(directory / "start")
    return directory


def config(work: Path, output: str, **changes) -> dict:
    """Training that goes on with the adapter: f32, no dropout, plain gradient steps, which do not blow errors up."""
    fixed = {
        "adapter_name_or_path": str(work / "start"),
        "lora_dropout": 0.0,
        "bf16": False,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "disable_shuffling": True,
    }
    return train_config(work, output, **{**fixed, **changes})


def history(output: Path, key: str = "loss") -> list[float]:
    entries = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in entries if key in entry]


def factors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def both(work):
    """Every run with our kernels and without kt_sft, in a process each."""
    others = {  # what stock LLaMA-Factory has no like of
        "rslora": {"use_rslora": True, "lora_target": "q_proj,experts"},
        "no_experts": {"kt_expert_lora": False},
    }
    ours = [config(work, f"ours-{name}", **keys) for name, keys in RUNS.items()]
    ours += [config(work, name, adapter_name_or_path=None, max_steps=1, **keys) for name, keys in others.items()]
    ours += [config(work, "one", gradient_accumulation_steps=2, **ADAM)]
    stock = [config(work, f"stock-{name}", use_kt=None, **keys) for name, keys in RUNS.items()]
    assert drive(RUN, ours) is True
    assert drive(RUN, stock, env=environment(use_kt=False)) is True
    return work


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_factors_are_those_of_stock_code(both, name):
    ours, stock = both / f"ours-{name}", both / f"stock-{name}"
    found, wanted = history(ours), history(stock)
    assert len(found) == len(wanted) == STEPS
    for one, other in zip(found, wanted, strict=True):
        assert abs(one - other) <= LOSS_ERROR * other, (found, wanted)
    before, after, expected = factors(both / "start"), factors(ours), factors(stock)
    assert before.keys() == after.keys() == expected.keys()
    for key, start in before.items():
        assert expected[key].sub(start).norm() > 1e-4 * start.norm(), f"{key}: stock code has not trained it"
        assert rel_l2(after[key] - start, expected[key] - start) <= CHANGE_ERROR, key
    if name == "sft":
        one, other = (json.loads((folder / "all_results.json").read_text()) for folder in (ours, stock))
        assert abs(one["eval_loss"] - other["eval_loss"]) <= LOSS_ERROR * other["eval_loss"]
        assert one["eval_accuracy"] == other["eval_accuracy"]


def test_targets_train_what_they_name(both):
    named = factors(both / "rslora")
    assert any(".experts." in key for key in named) and any(".q_proj." in key for key in named)
    assert all(".experts." in key or ".q_proj." in key for key in named)
    assert json.loads((both / "rslora" / "adapter_config.json").read_text())["use_rslora"] is True
    without = factors(both / "no_experts")
    assert without and not any(".experts." in key for key in without)


def test_two_processes_train_as_one_that_accumulates(both):
    """Bit by bit: the same batches, and sums of two numbers do not depend on who adds them."""
    work = both
    done = cli(
        "train", config(work, "two", ddp_timeout=600, **ADAM), work,
        env=environment(FORCE_TORCHRUN="1", NPROC_PER_NODE="2"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    for said in ("LoRA asked for:", "canary: step 1 changed all"):
        assert done.stderr.count(f"kt_sft: {said}") == 1, done.stderr[-6000:]
    for key in ("loss", "grad_norm"):
        found, wanted = history(work / "two", key), history(work / "one", key)
        assert len(found) == 2 and found == wanted, key
    for step in (1, 2):
        one, two = (work / name / f"checkpoint-{step}" for name in ("one", "two"))
        moments = [torch.load(d / "optimizer.pt", map_location="cpu")["state"] for d in (one, two)]
        assert moments[0].keys() == moments[1].keys() and len(moments[0]) == len(factors(one))
        for index, state in moments[0].items():
            for name, value in state.items():  # of Adam: sums of the gradients, and of their squares
                assert torch.equal(value, moments[1][index][name]), (step, index, name)
        assert all(value["exp_avg_sq"].any() for value in moments[0].values())
        wanted, found = factors(one), factors(two)
        assert wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted), step
