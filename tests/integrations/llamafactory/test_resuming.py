"""Going on from a checkpoint whose adapter has another form, other tensors, or another optimizer than the run."""

from __future__ import annotations

import contextlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

import kt_sft
from kt_sft.adapters import forms
from kt_sft.errors import ConfigError, FormatError, OutputError
from kt_sft.integrations.llamafactory import disk, resuming
from kt_sft.integrations.merge.inspecting import open_with_base
from kt_sft.integrations.peft import reloading
from tests.helpers import tiny_models, trainings

OTHER_FORMS = ("vllm", "peft-0.19")
FINETUNING = SimpleNamespace(pure_bf16=False)


@pytest.fixture(scope="module", autouse=True)
def methods():
    with trainings.patched():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return trainings.base_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def straight(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("straight") / "out"
    trainings.trainer(base, output).train()
    return output


@pytest.fixture
def checkpoint(straight, tmp_path):
    """A copy of the straight run's fourth step."""
    return shutil.copytree(straight / "checkpoint-4", tmp_path / "old" / "checkpoint-4")


def in_form(checkpoint, form: str) -> None:
    """Put the checkpoint's adapter into another form, as other tools and releases write it."""
    converted = forms.convert(open_with_base(checkpoint), form, checkpoint.parent / "converted")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(converted / name, checkpoint / name)


def edit_tensors(checkpoint, change) -> None:
    file = checkpoint / "adapter_model.safetensors"
    save_file(dict(filter(None, map(change, load_file(file).items()))), file)


def edit_config(checkpoint, **values) -> None:
    file = checkpoint / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def arguments(output, **values) -> TrainingArguments:
    given = {"learning_rate": 1e-2, "max_steps": 6, "save_steps": 2, "report_to": "none", "use_cpu": True}
    return TrainingArguments(output_dir=str(output), **given | values)


def run_adapter(base, *, rank: int = 2, alpha: int = 4, targets="all", **config) -> resuming.RunAdapter:
    """What `resuming.run_adapter` finds by LLaMA-Factory's code."""
    model = kt_sft.load_model(base)
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", **config)
    built = kt_sft.get_peft_model(model, lora)
    return resuming.RunAdapter(built.peft_config["default"], reloading.adapter_shapes(built))


def check(base, checkpoint, run=None, **values):
    model = kt_sft.load_model(base)
    run = run or run_adapter(base)
    resuming.check(checkpoint, reloading.bare_twin(model), run, arguments(checkpoint.parent, **values), FINETUNING)


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_an_adapter_of_another_form_goes_on_as_its_own(base, straight, checkpoint, tmp_path, form):
    in_form(checkpoint, form)
    check(base, checkpoint)
    run = trainings.trainer(base, tmp_path / "resumed")
    run.train(resume_from_checkpoint=str(checkpoint))
    resumed = trainings.losses(tmp_path / "resumed" / "checkpoint-6")
    assert resumed == trainings.losses(straight / "checkpoint-6")


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_load_adapter_converts_on_a_model_that_carries_one(base, checkpoint, form):
    ids = tiny_models.token_ids()
    expected = kt_sft.integrations.peft.load_adapter(kt_sft.load_model(base), checkpoint)(input_ids=ids).logits
    in_form(checkpoint, form)
    model = kt_sft.get_peft_model(kt_sft.load_model(base), LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    assert not torch.equal(model.eval()(input_ids=ids).logits, expected)
    model.load_adapter(str(checkpoint), "default")
    assert torch.equal(model(input_ids=ids).logits, expected)


FAULTS = {
    "without experts": (lambda item: None if ".experts." in item[0] else item, "experts"),
    "without one factor": (lambda item: None if "layers.1.mlp.experts.lora_B" in item[0] else item, "layers.1"),
    "without attention": (lambda item: None if "q_proj" in item[0] else item, "q_proj"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_missing_tensors_are_refused_before_loading_and_while_loading(base, checkpoint, tmp_path, fault):
    change, name = FAULTS[fault]
    edit_tensors(checkpoint, change)
    with pytest.raises(FormatError, match=name):
        check(base, checkpoint)
    with pytest.raises(FormatError, match=name):
        trainings.trainer(base, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))


SETTINGS = {
    "lora_rank": ({"rank": 3}, "lora_rank: expected 3, found 2"),
    "fewer targets": ({"targets": ["q_proj"]}, "in it, not trained here"),
    "no experts": ({"targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}, "experts"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_other_lora_settings_are_refused_before_loading_and_while_loading(base, checkpoint, tmp_path, setting):
    values, message = SETTINGS[setting]
    with pytest.raises(FormatError, match=message):
        check(base, checkpoint, run_adapter(base, **values))
    with pytest.raises(FormatError, match=message):
        trainings.trainer(base, tmp_path / "resumed", **values).train(resume_from_checkpoint=str(checkpoint))


def test_more_targets_than_the_checkpoint_has(base, tmp_path):
    run = trainings.trainer(base, tmp_path, targets=["q_proj"], max_steps=2)
    run.train()
    with pytest.raises(FormatError, match="trained here, not in it: model.layers.0.mlp.experts"):
        check(base, tmp_path / "checkpoint-2")


def edit_optimizer(checkpoint, change) -> None:
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    change(state)
    torch.save(state, checkpoint / "optimizer.pt")


@pytest.mark.parametrize("form", [None, *OTHER_FORMS])
def test_a_run_that_goes_on_with_an_adapter_trains_what_it_trained(base, tmp_path, form):
    """PEFT stores the head beside its LoRA, and the optimizer has no state of it; other forms are known as well."""
    targets = ["q_proj", "lm_head"] if form is None else "all"
    model = kt_sft.get_peft_model(
        kt_sft.load_model(base), LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "a")
    assert form or "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "a/adapter_model.safetensors")
    if form:
        forms.convert(open_with_base(tmp_path / "a", str(base)), form, tmp_path / form)
    given = SimpleNamespace(adapter_name_or_path=[str(tmp_path / (form or "a"))], adapter_folder=None)
    bare = reloading.bare_twin(kt_sft.load_model(base))
    run = resuming.run_adapter(bare, given, SimpleNamespace(create_new_adapter=False))
    assert run.shapes == reloading.adapter_shapes(model)
    assert len(run.shapes) == sum(parameter.requires_grad for parameter in model.parameters())


def test_a_vocabulary_that_may_grow_is_left_to_loading(base, checkpoint):
    """`resize_vocab` does it after loading; what loads the checkpoint then compares all tensors."""
    edit_config(checkpoint, modules_to_save=["lm_head"])
    file = checkpoint / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.weight": torch.ones(999, 48)}, file)
    bare = reloading.bare_twin(kt_sft.load_model(base))
    values = arguments(checkpoint.parent)
    resuming.check(checkpoint, bare, None, values, FINETUNING)
    with pytest.raises(FormatError, match=r"lm_head.weight: expected .* found \[999, 48\]"):
        check(base, checkpoint)


def test_an_optimizer_state_of_other_parameters_is_refused(base, checkpoint, tmp_path):
    edit_optimizer(checkpoint, lambda state: state["state"][0].update(exp_avg=torch.zeros(3, 5)))
    with pytest.raises(FormatError, match=r"optimizer.pt: optimizer state: .* found \[3, 5\]"):
        check(base, checkpoint)
    with pytest.raises(FormatError, match="optimizer state of parameter 0"):
        trainings.trainer(base, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))


def test_an_optimizer_state_in_another_order_is_refused_while_loading(base, checkpoint, tmp_path):
    def swap(state):
        state["state"][0], state["state"][1] = state["state"][1], state["state"][0]

    edit_optimizer(checkpoint, swap)
    with pytest.raises(FormatError, match="optimizer state of parameter 0"):
        trainings.trainer(base, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(("optim", "lacks"), [("sgd", "dampening, momentum"), ("adafactor", "beta1, clip_threshold")])
def test_another_kind_of_optimizer_is_refused(base, checkpoint, optim, lacks):
    """Its first step would look for settings that the state, which replaces its own, has not."""
    with pytest.raises(FormatError, match=f"expected one of optim: {optim}, found one of another .*without {lacks}"):
        check(base, checkpoint, optim=optim)
    check(base, checkpoint, optim="adamw_torch_fused")


def test_settings_that_the_optimizer_goes_on_with_and_a_finished_run_are_said(base, checkpoint, caplog):
    check(base, checkpoint)
    assert "there" not in caplog.text
    check(base, checkpoint, adam_beta1=0.5, max_steps=4)
    assert "adam_beta1 and adam_beta2 (0.5, 0.999) here are ignored, (0.9, 0.999)" in caplog.text
    assert "step 4 there, max_steps 4 here" in caplog.text


def test_the_directory_of_a_run_is_no_checkpoint(straight, tmp_path):
    """It has an adapter and a state, and its checkpoints would be taken for further adapters."""
    output = shutil.copytree(straight, tmp_path / "out")
    shutil.copytree(output / "checkpoint-6", output, dirs_exist_ok=True)
    with pytest.raises(FormatError, match="found the directory of a run; resume from .*checkpoint-6"):
        resuming.find_checkpoint(arguments(output, resume_from_checkpoint=str(output)))


def test_an_optimizer_state_of_fewer_parameters_is_refused(base, checkpoint):
    edit_optimizer(checkpoint, lambda state: state["param_groups"][0]["params"].pop())
    with pytest.raises(FormatError, match="expected 24 parameters, found 23"):
        check(base, checkpoint)


def test_a_state_that_may_be_of_either_layout_is_refused(tmp_path, monkeypatch):
    """Square experts: 2 inter == hidden, and LoRA on gate and up only, so that both layouts have the same shapes."""
    base = trainings.base_model(tmp_path / "square", hidden_size=48, moe_intermediate_size=24)
    targets = ["mlp.experts.gate_up_proj"]
    trainings.trainer(base, tmp_path / "run", targets=targets, max_steps=2).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    run = run_adapter(base, targets=targets)
    check(base, checkpoint, run)
    converted = shutil.copytree(checkpoint, tmp_path / "converted")
    monkeypatch.setattr(resuming, "in_running_form", lambda bare, source, **_: contextlib.nullcontext(converted))
    with pytest.raises(FormatError, match="may be of either"):
        check(base, checkpoint, run)


def test_what_differs_is_said_in_one_line(base, checkpoint, caplog):
    same, other = run_adapter(base), run_adapter(base, alpha=7, lora_dropout=0.25)
    caplog.clear()
    check(base, checkpoint, same)
    assert not caplog.records
    check(base, checkpoint, other, learning_rate=3e-4, weight_decay=0.5)
    (record,) = caplog.records
    for words in (
        "lora_alpha 4 there, 7 here is taken", "lora_dropout 0.0 there, 0.25 here is taken",
        "learning_rate 0.0003 here is ignored, 0.01 of its schedule", "weight_decay 0.5 here is ignored, 0 of",
    ):  # fmt: skip
        assert words in record.message
    assert "\n" not in record.message


def test_another_number_of_ranks_is_said(base, checkpoint, caplog):
    shutil.copyfile(checkpoint / "rng_state.pth", checkpoint / "rng_state_1.pth")
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    check(base, checkpoint)
    assert "written by 2 processes, this run has 1" in caplog.text


def test_no_optimizer_in_it_is_said(base, checkpoint, caplog):
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "scheduler.pt").unlink()
    check(base, checkpoint)
    assert "no optimizer.pt in it: optimizer and learning rate schedule start afresh" in caplog.text


def test_loads_what_ranks_of_a_cpu_ask_for(checkpoint):
    state = torch.load(checkpoint / "optimizer.pt", map_location=torch.device("cpu", 0), weights_only=True)
    assert state["state"][0]["exp_avg"].device.type == "cpu"


def test_which_checkpoint_is_taken(straight, tmp_path, caplog):
    output = shutil.copytree(straight, tmp_path / "out")
    file = output / "checkpoint-6" / "trainer_state.json"
    file.write_text(file.read_text()[:-40])
    assert resuming.find_checkpoint(arguments(output)) == output / "checkpoint-4"
    assert "checkpoint-6 (trainer_state.json ends early)" in caplog.text
    for words in (True, "true"):
        given = arguments(output, resume_from_checkpoint=words)
        assert resuming.find_checkpoint(given) == output / "checkpoint-4"
        assert given.resume_from_checkpoint == str(output / "checkpoint-4")
    assert resuming.find_checkpoint(arguments(output, resume_from_checkpoint=False)) is None
    named = arguments(output, resume_from_checkpoint=str(output / "checkpoint-2"))
    assert resuming.find_checkpoint(named) == output / "checkpoint-2"
    for name, message in (("checkpoint-6", "resume from .*checkpoint-4"), ("checkpoint-8", "found nothing")):
        with pytest.raises(FormatError, match=message):
            resuming.find_checkpoint(arguments(output, resume_from_checkpoint=str(output / name)))
    for step in (2, 4):
        (output / f"checkpoint-{step}" / "adapter_config.json").unlink()
    assert resuming.find_checkpoint(arguments(output)) is None
    with pytest.raises(ConfigError, match="checkpoint-2: adapter_config.json is missing"):
        resuming.find_checkpoint(arguments(output, resume_from_checkpoint=True))
    assert resuming.find_checkpoint(arguments(tmp_path / "new")) is None


def test_an_output_directory_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="expected a directory, found a file"):
            disk.check_writable(str(output))
    disk.check_writable(str(tmp_path / "new" / "deep"))
    assert not (tmp_path / "new").exists()
    with pytest.raises(OutputError, match="cannot be written"):
        disk.check_writable("/proc/kt_sft/out")


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({"save_strategy": "no"}, 4),
        ({"max_steps": -1}, 4 + 12),
        ({}, 4 + 3 * 12),
        ({"save_total_limit": 1}, 4 + 2 * 12),
        ({"save_steps": 0.5}, 4 + 2 * 12),
        ({"save_only_model": True}, 4 + 3 * 4),
        ({"optim": "sgd"}, 4 + 3 * 4),
    ],
)
def test_room_is_counted_before_training(tmp_path, monkeypatch, values, needed):
    """Bytes per trained element: 4 of the adapter, and 8 of Adam's state in each checkpoint."""
    numel = 1 << 30
    enough = needed * numel + disk._SMALL_FILES_BYTES
    monkeypatch.setattr(disk, "free_bytes", lambda folder: enough)
    disk.check_room(str(tmp_path / "out"), numel, arguments(tmp_path, **values), FINETUNING)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: enough - 1)
    with pytest.raises(OutputError, match=rf"expected {enough / 2**30:.2f} GiB, found .* available"):
        disk.check_room(str(tmp_path / "out"), numel, arguments(tmp_path, **values), FINETUNING)


def test_checkpoints_that_are_there_need_no_further_room(straight):
    assert disk._further_checkpoints(straight, arguments(straight, save_total_limit=3)) == 1
    assert disk._further_checkpoints(straight, arguments(straight, max_steps=12)) == 3
    assert disk.free_bytes(straight) > 0
