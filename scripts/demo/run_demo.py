"""The demo: a sparse MoE model learns who it is, on the CPU, through stock LLaMA-Factory.

    python scripts/demo/run_demo.py [--family qwen3_moe] [--method int8] [--weights a container or GGUF file]

Builds the model if it is missing, asks held-out questions, trains with
`USE_KT=1 llamafactory-cli train examples/train_lora/tiny_moe.yaml`, asks again, and shows both answers side by side.
An adapter of an earlier run is kept: this one then goes to a folder of its own. Exits with 1 if the training failed or
did not change the answers.
"""

from __future__ import annotations

import os

# OpenMP threads that spin between torch's operations take the cores from the expert kernels: on a busy machine the
# demo then takes ten times as long. The training process inherits this.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from build_moe import FamilyName, build
from chat_answers import Question, ask, read_questions
from loss_curve import draw, read_losses
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text
from tiny_moe.gguf_source import SourceError

from kt_sft.formats.staging import write_text

ROOT = Path(__file__).resolve().parents[2]
TRAIN_YAML = Path("examples/train_lora/tiny_moe.yaml")
QUESTIONS = Path("examples/data/kt_sft_identity_heldout.json")
LOGS = ("train.log", "trainer_log.jsonl")  # what a training that failed leaves behind
MIN_LEARNED = 0.5  # share of the held-out identity questions whose answer must hold the expected words


class Method(StrEnum):
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"
    gguf = "gguf"


class DemoError(RuntimeError):
    """The demo cannot go on; the message says what to do."""


@dataclass(frozen=True)
class Run:
    """What is trained and where it goes, as the training YAML says it (paths relative to the repository root)."""

    family: str
    method: str
    model: Path
    output: Path
    system: str
    weights: Path | None = None  # where the experts are read from, if not from the model

    @classmethod
    def from_yaml(cls, family: str, method: str = Method.bf16, weights: Path | None = None) -> Run:
        keys = yaml.safe_load((ROOT / TRAIN_YAML).read_text(encoding="utf-8"))
        suffix = "" if family == FamilyName.mixtral.value else f"_{family}"
        held = ("" if method == Method.bf16 else f"_{method}") + ("" if weights is None else f"_{weights.stem}")
        return cls(
            family=family,
            method=method,
            model=Path(keys["model_name_or_path"] + suffix),
            output=Path(keys["output_dir"] + suffix + held),
            system=keys["default_system"],
            weights=weights,
        )

    def into_free_folder(self) -> Run:
        """The same run with an output folder that holds nothing yet: NAME, NAME_2, NAME_3, ..."""
        names = (
            self.output if i == 1 else self.output.with_name(f"{self.output.name}_{i}") for i in itertools.count(1)
        )
        return replace(self, output=next(name for name in names if _is_free(ROOT / name)))

    def overrides(self) -> list[str]:
        """Keys that differ from the YAML and say which model and format."""
        words = [] if self.family == FamilyName.mixtral.value else [f"model_name_or_path={self.model}"]
        words += [] if self.method == Method.bf16 else [f"kt_method={self.method.upper()}"]
        return words if self.weights is None else [*words, f"kt_weight_path={self.weights}"]

    def command(self) -> list[str]:
        """The training command; overrides appear only where the run deviates from the YAML."""
        return ["llamafactory-cli", "train", str(TRAIN_YAML), *self.overrides(), *self.output_as("output_dir")]

    def output_as(self, key: str) -> list[str]:
        """The output folder under a key, unless it is the one that the YAML files name."""
        stated = yaml.safe_load((ROOT / TRAIN_YAML).read_text(encoding="utf-8"))["output_dir"]
        return [] if self.output == Path(stated) else [f"{key}={self.output}"]


@dataclass(frozen=True)
class Outcome:
    """Answers before and after, and what they prove."""

    questions: list[Question]
    before: list[str]
    after: list[str]

    def learned(self) -> int:
        """Identity questions answered right now and wrongly before."""
        rows = zip(self.questions, self.before, self.after, strict=True)
        return sum(not q.is_general and q.is_met_by(new) and not q.is_met_by(old) for q, old, new in rows)

    def faults(self) -> list[str]:
        num_identity = sum(not q.is_general for q in self.questions)
        faults = []
        if self.before == self.after:
            faults.append("no answer changed: the adapter has no effect")
        elif self.learned() < MIN_LEARNED * num_identity:
            faults.append(f"only {self.learned()} of {num_identity} facts learned, expected half or more")
        for name, answers in (("before", self.before), ("after", self.after)):
            wrong = [
                q.text for q, a in zip(self.questions, answers, strict=True) if q.is_general and not q.is_met_by(a)
            ]
            faults += [f"general knowledge wrong {name} the training: {text}" for text in wrong]
        return faults


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and all(file.name in LOGS for file in folder.iterdir()))


def find_llamafactory() -> str:
    beside = Path(sys.executable).parent / "llamafactory-cli"
    found = str(beside) if beside.exists() else shutil.which("llamafactory-cli")
    if found is None:
        raise DemoError("llamafactory-cli: not found beside this Python or on PATH; run `make setup`")
    return found


def typed_llamafactory() -> str:
    """What to type in the repository root: the virtual environment of `make demo` is not activated."""
    found = find_llamafactory()
    if shutil.which("llamafactory-cli") == found:
        return "llamafactory-cli"
    return str(Path(found).relative_to(ROOT)) if Path(found).is_relative_to(ROOT) else found


def load(run: Run) -> tuple[Any, Any]:
    """The model with its experts in our kernels, and its tokenizer."""
    try:
        import kt_sft
    except ImportError as error:
        raise DemoError(f"kt_sft cannot be imported ({error}); run `make setup`") from None
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = kt_sft.KTConfig(method=run.method, weight_path=None if run.weights is None else str(ROOT / run.weights))
    model = kt_sft.load_model(str(ROOT / run.model), config, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(ROOT / run.model)


def train(run: Run, console: Console) -> None:
    """Run the real command line in a process of its own; its output goes to train.log.

    Args:
        run: its output folder is free (`Run.into_free_folder`): the training would write over what is there.
    Raises:
        DemoError: it failed, with the end of its output.
    """
    output = ROOT / run.output
    output.mkdir(parents=True, exist_ok=True)
    for stale in LOGS:
        (output / stale).unlink(missing_ok=True)
    log = output / "train.log"
    command = [find_llamafactory(), *run.command()[1:]]
    environment = {**os.environ, "USE_KT": "1"}
    with log.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        try:
            _show_progress(process, output / "trainer_log.jsonl", console)
        finally:
            if process.poll() is None:  # interrupted
                process.terminate()
                process.wait()
    if process.returncode != 0 or not (output / "adapter_model.safetensors").exists():
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
        raise DemoError(f"{tail}\ntraining failed with exit status {process.returncode}; whole output: {log}")


def _show_progress(process: subprocess.Popen, trainer_log: Path, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("loading model and data", total=None)
        while process.poll() is None:
            time.sleep(0.5)
            steps, losses = read_losses(trainer_log)
            if steps:
                last = json.loads(trainer_log.read_text(encoding="utf-8").splitlines()[0])
                progress.update(
                    task, completed=steps[-1], total=last["total_steps"], description=f"step, loss {losses[-1]:.3f}"
                )


def answers_table(outcome: Outcome) -> Table:
    """One block of lines for each question: beside one another the answers would be cut off at 80 columns."""
    title = "The same questions before and after; none of them is in the training data"
    table = Table(Column(no_wrap=True), Column(overflow="fold"), title=title, show_header=False)
    for question, old, new in zip(outcome.questions, outcome.before, outcome.after, strict=True):
        mark = "✓" if question.is_met_by(new) else "✗"
        note = f"{mark} {question.expects}" + (" (as before)" if question.is_general else "")
        lines = (("question", question.text, "bold"), ("before", old, "red"), ("after", new, "green"))
        for label, text, style in (*lines, ("expected", note, "")):
            table.add_row(label, Text(text, style=style))
        table.add_section()
    return table


def report(run: Run, outcome: Outcome, console: Console, *, seconds: float) -> None:
    """Print the table, draw the loss curve, save the answers, and say where everything is."""
    output = ROOT / run.output
    steps, losses = read_losses(output / "trainer_log.jsonl")
    curve = output / "loss_curve.png"
    title = f"kt_sft demo: LoRA on a {run.family} model, 16 {run.method} experts on the CPU"
    draw(steps, losses, curve, title=title)
    rows = [
        {"question": q.text, "expects": q.expects, "before": old, "after": new}
        for q, old, new in zip(outcome.questions, outcome.before, outcome.after, strict=True)
    ]
    answers = output / "answers.json"
    write_text(answers, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    console.print(answers_table(outcome))
    num_identity = sum(not q.is_general for q in outcome.questions)
    console.print(
        f"learned {outcome.learned()} of {num_identity} facts; loss {losses[0]:.2f} -> {losses[-1]:.2f} "
        f"in {steps[-1]} steps; {seconds:.0f} s in all\n"
    )
    cli = typed_llamafactory()
    words = [*run.overrides(), *run.output_as("adapter_name_or_path")]
    chat = " ".join([f"USE_KT=1 {cli} chat examples/chat/tiny_moe.yaml", *words])
    for name, place in (
        ("model", run.model),
        ("adapter", run.output),
        ("loss curve", curve.relative_to(ROOT)),
        ("answers", answers.relative_to(ROOT)),
        ("training log", run.output / "train.log"),
        ("training command", f"USE_KT=1 {' '.join([cli, *run.command()[1:]])}"),
        ("chat with it", chat),
    ):
        console.print(f"  {name + ':':18}{place}", highlight=False, soft_wrap=True)


def run_all(run: Run, console: Console) -> Outcome:
    start = time.perf_counter()
    wanted, run = run.output, run.into_free_folder()
    if run.output != wanted:
        console.print(f"{wanted} is there already and is kept; this run goes to {run.output}", highlight=False)
    questions = read_questions(ROOT / QUESTIONS)
    with console.status(f"[1/4] building {run.model} from SmolLM2-135M-Instruct ..."):
        written = build(ROOT / run.model, family=run.family)
    console.print(f"[1/4] model {'built' if written else 'is there already'}: {run.model}")
    with console.status("[2/4] asking the model as it is ..."):
        model, tokenizer = load(run)
        before = ask(model, tokenizer, questions, system=run.system)
    console.print(f"[2/4] asked {len(questions)} questions before the training")
    console.print(f"[3/4] USE_KT=1 {' '.join(run.command())}", highlight=False, soft_wrap=True)
    train(run, console)
    with console.status("[4/4] asking the same questions with the adapter ..."):
        import kt_sft

        after = ask(kt_sft.load_adapter(model, ROOT / run.output), tokenizer, questions, system=run.system)
    console.print("[4/4] asked them again with the adapter\n")
    outcome = Outcome(questions, before, after)
    report(run, outcome, console, seconds=time.perf_counter() - start)
    return outcome


def main(
    family: Annotated[FamilyName, typer.Option(help="Format of the demo model.")] = FamilyName.mixtral,
    method: Annotated[Method, typer.Option(help="Weight format of the experts in memory.")] = Method.bf16,
    weights: Annotated[Path | None, typer.Option(help="Read the experts from here; method gguf needs it.")] = None,
) -> None:
    """Build a small MoE, fine-tune it through LLaMA-Factory, show its answers before and after."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the training is ended too
    errors = Console(stderr=True)
    try:
        faults = run_all(Run.from_yaml(family.value, method.value, weights), Console()).faults()
    except (DemoError, SourceError) as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    for fault in faults:
        errors.print(f"error: {fault}", style="red", markup=False, highlight=False)
    if faults:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
