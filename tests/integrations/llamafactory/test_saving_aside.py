"""Checkpoints of a run with our experts: whole under their name or not there, resumed bit for bit, ended by signals."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from kt_sft.errors import OutputError
from kt_sft.formats import training_checkpoint
from kt_sft.integrations.llamafactory import interrupts, resuming, saving
from tests.helpers import trainings

LIMIT = resource.RLIM_INFINITY


class At(TrainerCallback):
    """Calls something in the middle of a step."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.action()


@pytest.fixture(scope="module", autouse=True)
def methods():
    with trainings.patched():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return trainings.base_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def straight(base, tmp_path_factory):
    """A run of six steps without any event; its output directory."""
    output = tmp_path_factory.mktemp("straight") / "out"
    run = trainings.trainer(base, output)
    run.train()
    run.save_model()
    return output


@pytest.fixture
def output(straight, tmp_path):
    """A copy of the straight run's."""
    return shutil.copytree(straight, tmp_path / "out")


@pytest.fixture
def full_disk():
    """A function after which no file may become longer than the given bytes, as on a full disk."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda num_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, LIMIT))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    signal.signal(signal.SIGXFSZ, before)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_adapter(left, right) -> bool:
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (left, right))
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_checkpoints_are_whole_and_nothing_else_stays(straight):
    found = [path.name for path in straight.iterdir() if path.is_dir()]
    assert sorted(found) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert all(training_checkpoint.find_fault(straight / name) is None for name in found)
    assert same_adapter(straight, straight / "checkpoint-6")


@pytest.mark.parametrize("step", [2, 4])
def test_resuming_repeats_the_rest_bit_for_bit(base, straight, tmp_path, step):
    run = trainings.trainer(base, tmp_path)
    run.train(resume_from_checkpoint=str(straight / f"checkpoint-{step}"))
    assert trainings.losses(tmp_path / "checkpoint-6") == trainings.losses(straight / "checkpoint-6")
    assert same_adapter(tmp_path / "checkpoint-6", straight / "checkpoint-6")


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it."""


@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_a_process_that_dies_while_saving_leaves_no_checkpoint_of_that_name(
    base, straight, tmp_path, monkeypatch, call
):
    """Dies half-way through a file: optimizer, scheduler, random state or, at the fourth, the state of the trainer."""
    run = trainings.trainer(base, tmp_path)
    stock, calls = torch.save, []

    def save(value, path, *args, **kwargs):
        stock(value, path, *args, **kwargs)
        in_second = "checkpoint-4" in str(path) and not str(path).endswith("training_args.bin")
        if in_second and (calls.append(path) or len(calls) == call + 1):
            os.truncate(path, os.path.getsize(path) // 2)
            raise Killed

    def state(self, path):
        if "checkpoint-4" in path:
            raise Killed
        return stock_state(self, path)

    stock_state = type(run.state).save_to_json
    monkeypatch.setattr(torch, "save", save)
    if call == 3:
        monkeypatch.setattr(type(run.state), "save_to_json", state)
    with pytest.raises(Killed):
        run.train()
    monkeypatch.undo()
    assert names(tmp_path) == ["_incomplete", "checkpoint-2"] and names(tmp_path / "_incomplete") == ["checkpoint-4"]
    saving.clean(tmp_path, removes=True)
    assert names(tmp_path) == ["checkpoint-2"] and resuming.last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_a_checkpoint_that_waited_for_its_name_gets_it(output):
    staging = output / saving.STAGING
    staging.mkdir()
    (output / "checkpoint-6").rename(staging / "checkpoint-6")
    shutil.copytree(output / "checkpoint-4", staging / "replaced-checkpoint-6")
    saving.clean(output, removes=True)
    assert training_checkpoint.find_fault(output / "checkpoint-6") is None and not staging.exists()


def test_a_checkpoint_replaces_a_broken_one_of_its_name(base, output):
    file = output / "checkpoint-6" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:50])
    (output / "checkpoint-6" / "left.txt").write_text("of the broken one")
    found = resuming.last_checkpoint(output)
    assert found == output / "checkpoint-4"
    trainings.trainer(base, output).train(resume_from_checkpoint=str(found))
    assert training_checkpoint.find_fault(output / "checkpoint-6") is None
    assert "left.txt" not in names(output / "checkpoint-6") and not (output / saving.STAGING).exists()


def test_the_number_of_checkpoints_is_kept(base, tmp_path):
    trainings.trainer(base, tmp_path, save_total_limit=2, save_steps=1).train()
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6"]


def test_the_best_checkpoint_is_named_kept_and_loaded(base, tmp_path):
    run = trainings.trainer(
        base, tmp_path, save_total_limit=1, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2
    )
    values = {2: 3.0, 4: 1.0, 6: 2.0}
    run.evaluate = lambda *args, **kwargs: {"eval_loss": values[run.state.global_step]}
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-4") and names(tmp_path) == ["checkpoint-4"]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-4")
    run.save_model(str(tmp_path / "final"))
    assert same_adapter(tmp_path / "final", tmp_path / "checkpoint-4")


def test_a_final_save_that_dies_leaves_the_adapter_that_was_there(base, output, monkeypatch):
    run = trainings.trainer(base, output)
    before = load_file(output / "adapter_model.safetensors")

    def half(tensors, path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise Killed

    monkeypatch.setattr("peft.peft_model.safe_save_file", half)
    with pytest.raises(Killed):
        run.save_model()
    after = load_file(output / "adapter_model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.fixture
def heard():
    """Signals as in a terminal: nohup and shells in the background switch some of them off."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {signum: signal.signal(signum, handler) for signum, handler in usual.items()}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(base, straight, tmp_path, signum, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/llamafactory-cli", "my run.yaml", "max_steps=6"])
    stop = At(3, lambda: os.kill(os.getpid(), signum))
    run = trainings.trainer(base, tmp_path, stop, save_only_model=True, save_strategy="no")
    with pytest.raises(interrupts.Interrupted) as caught:
        run.train()
    checkpoint = tmp_path / "checkpoint-3"
    assert caught.value.status == 128 + signum and names(tmp_path) == ["checkpoint-3"]
    command = f"USE_KT=1 llamafactory-cli train 'my run.yaml' max_steps=6 resume_from_checkpoint={checkpoint}"
    assert str(caught.value) == f"stopped after step 3 of 6; go on with: {command}"
    trainings.trainer(base, tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert trainings.losses(tmp_path / "checkpoint-6") == trainings.losses(straight / "checkpoint-6")
    assert same_adapter(tmp_path / "checkpoint-6", straight / "checkpoint-6")


@pytest.mark.usefixtures("heard")
def test_a_second_signal_ends_it_at_once(base, tmp_path, monkeypatch):
    monkeypatch.setattr(interrupts, "_SAME_WISH_SECONDS", 0.0)

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(interrupts.Interrupted, match="at once"):
        trainings.trainer(base, tmp_path, At(3, twice), save_strategy="no").train()
    assert not tmp_path.joinpath("checkpoint-3").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("heard")
def test_signals_of_torchrun_and_terminal_are_one_wish(base, tmp_path):
    def both():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(interrupts.Interrupted, match="after step 3"):
        trainings.trainer(base, tmp_path, At(3, both)).train()


def test_a_signal_that_is_switched_off_stays_so(base, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as of nohup
    try:
        trainings.trainer(base, tmp_path, At(3, lambda: os.kill(os.getpid(), signal.SIGHUP))).train()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "checkpoint-6" in names(tmp_path) and "checkpoint-3" not in names(tmp_path)


def test_a_signal_in_the_last_step_lets_the_run_end(base, tmp_path):
    trainings.trainer(base, tmp_path, At(6, lambda: os.kill(os.getpid(), signal.SIGTERM))).train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(base, straight, tmp_path, full_disk, caplog):
    weights = (straight / "adapter_model.safetensors").stat().st_size
    run = trainings.trainer(base, tmp_path, At(3, lambda: full_disk(weights + 5000)))
    run.train()
    run.save_model()
    assert "checkpoint-2" in names(tmp_path) and "checkpoint-4" not in names(tmp_path)
    assert same_adapter(tmp_path, straight) and not (tmp_path / saving.STAGING).exists()
    assert "checkpoint-4: checkpoint not written" in caplog.text and "training goes on" in caplog.text


def test_a_full_disk_at_the_end_keeps_the_adapter_somewhere(base, straight, tmp_path, monkeypatch):
    """Writes fail below the output directory and in its staging; the parent takes them."""
    output = tmp_path / "out"
    run = trainings.trainer(base, output, save_strategy="no")
    run.train()
    stock = safetensors.torch.save_file

    def save(tensors, path, *args, **kwargs):
        if str(path).startswith(f"{output}/") or "/out-adapter-" not in str(path):
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        stock(tensors, path, *args, **kwargs)

    monkeypatch.setattr("peft.peft_model.safe_save_file", save)
    with pytest.raises(OutputError, match="No space left") as caught:
        run.save_model()
    (kept,) = tmp_path.glob("out-adapter-*")
    assert str(kept) in str(caught.value) and same_adapter(kept, straight)
    assert names(output) == []
