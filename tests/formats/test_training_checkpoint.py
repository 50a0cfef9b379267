"""Whether a checkpoint of the trainer is whole, on files that end early at every place that a kill can leave."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from kt_sft.formats.training_checkpoint import checkpoints, find_fault, newest_whole, num_ranks


@pytest.fixture
def run(tmp_path):
    """A run with whole checkpoints 2, 10 and 9, as stock code writes them, and things that are none."""
    for step in (2, 10, 9):
        write(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "_incomplete" / "checkpoint-99").mkdir(parents=True)
    (tmp_path / "checkpoint-77").write_text("a file")
    return tmp_path


def write(folder, step: int) -> None:
    folder.mkdir()
    weights = torch.arange(6.0).reshape(2, 3)
    save_file({"base_model.model.q_proj.lora_A.weight": weights}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    torch.save({"state": {0: {"exp_avg": weights}}, "param_groups": [{"params": [0]}]}, folder / "optimizer.pt")
    torch.save({"base_lrs": [0.1]}, folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def test_the_highest_step_comes_first(run):
    assert [path.name for path in checkpoints(run)] == ["checkpoint-10", "checkpoint-9", "checkpoint-2"]
    assert newest_whole(run) == (run / "checkpoint-10", {})
    assert checkpoints(run / "missing") == [] and newest_whole(run / "missing") == (None, {})


FILES = ("adapter_model.safetensors", "adapter_config.json", "trainer_state.json")
FILES += ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, -1])
def test_a_file_that_ends_early_is_named_and_the_one_before_is_taken(run, name, kept):
    file = run / "checkpoint-10" / name
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data))] if kept >= 0 else data[: len(data.rstrip()) - 1])
    found, broken = newest_whole(run)
    assert found == run / "checkpoint-9" and list(broken) == ["checkpoint-10"] and name in broken["checkpoint-10"]


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("optimizer.pt", "rng_state.pth")])
def test_a_missing_file_is_named(run, name):
    (run / "checkpoint-10" / name).unlink()
    assert find_fault(run / "checkpoint-10") == f"{name} is missing"


def test_without_optimizer_it_is_whole(run):
    """Of `save_only_model`."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (run / "checkpoint-10" / name).unlink()
    assert find_fault(run / "checkpoint-10") is None and num_ranks(run / "checkpoint-10") is None


def test_random_states_of_several_ranks(run):
    folder = run / "checkpoint-10"
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    shutil.copyfile(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert find_fault(folder) is None and num_ranks(folder) == 2
    (folder / "rng_state_1.pth").write_bytes((folder / "rng_state_0.pth").read_bytes()[:-30])
    assert find_fault(folder) == "rng_state_1.pth ends early"


def test_states_of_deepspeed(run):
    folder = run / "checkpoint-10"
    (folder / "latest").write_text("global_step10")
    assert "latest" in find_fault(folder)
    (folder / "global_step10").mkdir()
    assert find_fault(folder) == "global_step10 holds no model states"
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"a": torch.ones(3)}, folder / "global_step10" / name)
    assert find_fault(folder) is None
    file = folder / "global_step10" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:-9])
    assert find_fault(folder) == f"global_step10/{file.name} ends early"
