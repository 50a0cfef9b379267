"""How runs of LLaMA-Factory begin and end: what they resume from, signals through torchrun, kills while saving."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from kt_sft.errors import ConfigError
from kt_sft.formats import training_checkpoint
from kt_sft.integrations.llamafactory import interrupts, reporting
from tests.helpers.llamafactory_runs import cli, drive, environment, train_config, workspace

RUN = """
import contextlib, io, logging, shutil, sys
from pathlib import Path
from llamafactory.train.tuner import run_exp
said = io.StringIO()
logging.getLogger().addHandler(logging.StreamHandler(said))
answers = []
for config, damaged in given[0]:
    for source, target, file in damaged:
        shutil.copytree(source, target, dirs_exist_ok=True)
        if file:
            path = Path(target, file)
            path.write_bytes(path.read_bytes()[:-50])
    said.seek(0), said.truncate(0)
    try:
        run_exp(config)
        answers.append(["", said.getvalue()])
    except Exception as error:
        answers.append([f"{type(error).__name__}: {error}", said.getvalue()])
give(answers)
"""
ONE = {"lora_dropout": 0.0, "max_steps": 6, "save_steps": 2}


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("life"))


@pytest.fixture(scope="module")
def answers(work):
    """Error (or none) and log of each run, all in one process, in the order of their names here."""
    old, file = work / "straight" / "checkpoint-4", "adapter_model.safetensors"
    copied = [
        [str(old), str(work / "automatic" / "checkpoint-2"), None],
        [str(old), str(work / "automatic" / "checkpoint-5"), file],
    ]
    (work / "taken").write_text("a file")
    steps = {
        "straight": ({}, []),
        "true": ({"resume_from_checkpoint": True}, [[str(old), str(work / "true" / "checkpoint-4"), None]]),
        "automatic": ({}, copied),
        "broken": ({}, [[str(old), str(work / "broken" / "checkpoint-4"), file]]),
        "rank": ({"resume_from_checkpoint": str(old), "lora_rank": 8, "dataset_dir": "missing"}, []),
        "target": ({"resume_from_checkpoint": str(old), "lora_target": "q_proj", "dataset_dir": "missing"}, []),
        "settings": ({"resume_from_checkpoint": str(old), "lora_alpha": 3, "learning_rate": 0.001}, []),
        "taken": ({"dataset_dir": "missing"}, []),
    }  # fmt: skip
    configs = [(train_config(work, name, **ONE, **changes), damaged) for name, (changes, damaged) in steps.items()]
    return dict(zip(steps, drive(RUN, configs), strict=True))


@pytest.mark.parametrize("name", ["true", "automatic", "broken"])
def test_resumed_runs_repeat_the_straight_one(work, answers, name):
    assert answers[name][0] == "" and losses(work / name) == losses(work / "straight")
    assert training_checkpoint.newest_whole(work / name) == (work / name / "checkpoint-6", {})


def test_checkpoints_that_are_not_whole_are_named(answers):
    early = "(adapter_model.safetensors ends early)"
    assert f"checkpoint-5 {early}; checkpoint-2 is the newest whole one" in answers["automatic"][1]
    assert f"checkpoint-4 {early}; there is no whole one, the run starts over" in answers["broken"][1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rank", "lora_rank: expected 8, found 4"),
        ("target", "in it, not trained here: model.layers.0.mlp.experts"),
        ("taken", "output_dir: expected a directory, found a file"),
    ],
)
def test_faults_come_before_the_data_set_is_read(answers, name, message):
    """The data set of these runs does not exist."""
    assert message in answers[name][0] and "\n" not in answers[name][0]


def test_changed_settings_are_said_once(answers):
    error, said = answers["settings"]
    (line,) = {line for line in said.splitlines() if "resume_from_checkpoint: checkpoint-4" in line}
    assert not error and "lora_alpha 8 there, 3 here is taken" in line
    assert "learning_rate 0.001 here is ignored, 0.01 of its schedule goes on" in line


@pytest.mark.parametrize(
    ("argv", "processes", "expected"),
    [
        (["llamafactory-cli", "run.yaml"], 1, "USE_KT=1 llamafactory-cli train run.yaml resume_from_checkpoint=out"),
        (
            ["/x/launcher.py", "run.yaml", "resume_from_checkpoint=old", "seed=2"], 2,
            "USE_KT=1 FORCE_TORCHRUN=1 NPROC_PER_NODE=2 llamafactory-cli train run.yaml seed=2 "
            "resume_from_checkpoint=out",
        ),
        (
            ["lmf", "--seed", "2", "--resume_from_checkpoint", "old", "--do_train"], 1,
            "USE_KT=1 llamafactory-cli train --seed 2 --do_train --resume_from_checkpoint out",
        ),
        (["train.py"], 1, "resume_from_checkpoint: out"),
    ],
)  # fmt: skip
def test_the_command_that_resumes(argv, processes, expected):
    assert interrupts.resuming_command(argv, Path("out"), processes=processes) == expected


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (ConfigError("a fault"), "kt_sft: error: a fault\n", 2),
        (interrupts.Interrupted(15, "stopped after step 3"), "kt_sft: stopped after step 3\n", 143),
        (KeyboardInterrupt(), "kt_sft: stopped\n", 130),
        (OSError(errno.ENOSPC, "No space left", "out/x"), "kt_sft: error: out/x: No space left; free space there\n", 2),
    ],
)  # fmt: skip
def test_the_end_of_a_rank_is_one_line(monkeypatch, capfd, error, line, status):
    """Where torch has started ranks its own hook runs ours within a buffer, which is lost when that one leaves."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    reporting.report_errors_in_one_line()
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(SystemExit) as left:
        sys.excepthook(type(error), error, None)
    assert left.value.code == status and capfd.readouterr().err.startswith(line)


PARENT = """
import os, sys
from kt_sft.integrations.llamafactory.interrupts import run_passing_signals
child = "import signal, sys, time; signal.signal(signal.{0}, lambda *_: sys.exit(7)); "
child += "print('ready', flush=True); time.sleep(60)"
run_passing_signals([sys.executable, "-c", child], env=dict(os.environ), check=True)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_is_passed_on_and_waited_for(name):
    number = getattr(signal, name)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(name)],
        stdout=subprocess.PIPE, text=True, env=environment(),
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # shells switch SIGINT off in the background
    )  # fmt: skip
    assert parent.stdout.readline() == "ready\n"
    parent.send_signal(number)
    assert parent.wait(timeout=30) == 128 + number
    assert parent.stdout.read() == "", "the child holds the pipe no longer"


def start(work: Path, config: dict, name: str, **env: str) -> subprocess.Popen:
    file = work / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return subprocess.Popen(
        [sys.executable, "-m", "llamafactory.cli", "train", str(file)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(**env), cwd=work,
    )  # fmt: skip


def wait_for(condition, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def ranks_of(name: str) -> list[str]:
    """Command lines of processes that still work on a run's file."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(entry.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if f"{name}.yaml" in line]


@pytest.mark.slow
def test_sigterm_ends_the_ranks_of_torchrun_with_a_checkpoint_that_one_process_loads(work):
    config = train_config(work, "ranks", lora_dropout=0.0, max_steps=100_000, save_steps=50_000)
    run = start(work, config, "ranks", FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    wait_for(lambda: (work / "ranks" / "trainer_log.jsonl").is_file())
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM and not ranks_of("ranks")
    found, broken = training_checkpoint.newest_whole(work / "ranks")
    assert found is not None and not broken and training_checkpoint.num_ranks(found) == 2
    assert (
        f"FORCE_TORCHRUN=1 NPROC_PER_NODE=2 llamafactory-cli train {work / 'ranks.yaml'} resume_from_checkpoint={found}"
        in said
    )
    step = int(found.name.rpartition("-")[2])
    alone = train_config(work, "alone", lora_dropout=0.0, max_steps=step + 1, resume_from_checkpoint=str(found))
    done = cli("train", alone, work)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "written by 2 processes, this run has 1" in done.stderr


def has_another(output: Path, newest: str) -> bool:
    found = training_checkpoint.checkpoints(output)
    return bool(found) and found[0].name != newest


@pytest.mark.slow
def test_kills_at_any_moment_leave_whole_checkpoints_only(work):
    """Saves at every step, so that most kills hit a save; then one run resumes from what is there."""
    config = train_config(work, "killed", lora_dropout=0.0, max_steps=100_000, save_steps=1, save_total_limit=3)
    moments = random.Random(5)
    for _ in range(4):
        before = training_checkpoint.checkpoints(work / "killed")
        run = start(work, config, "killed")
        newest = before[0].name if before else ""
        wait_for(functools.partial(has_another, work / "killed", newest))
        time.sleep(moments.uniform(0.0, 0.3))
        os.kill(run.pid, signal.SIGKILL)
        run.communicate()
        found = training_checkpoint.checkpoints(work / "killed")
        assert found and [training_checkpoint.find_fault(path) for path in found] == [None] * len(found)
        assert int(found[0].name.rpartition("-")[2]) > (int(newest.rpartition("-")[2]) if newest else 0)
    shutil.rmtree(work / "killed")
