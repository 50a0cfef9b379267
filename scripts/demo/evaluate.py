"""What the demo's fine-tuning changed, in figures, through LLaMA-Factory's own batch evaluation.

    python scripts/demo/evaluate.py [--rows 52]

Predicts the rows of examples/data/kt_sft_identity_eval.json, none of which is in the training data, with the model as
it was and with the trained adapter (BLEU, ROUGE, token accuracy), and once more with the adapter in stock
LLaMA-Factory, transformers and PEFT without kt_sft: the same greedy tokens are wanted until a step at which rounding
decides. The same questions are then put to `llamafactory-cli chat`, to `llamafactory-cli api` in concurrent streams and
to `kt-sft serve` by an Ollama client. Writes docs/evaluation.md. `make demo` must have trained the adapter.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import surfaces
import typer
import yaml
from generation_parity import Divergence, Pair, explain
from rich.console import Console
from run_demo import ROOT, TRAIN_YAML

from kt_sft.formats.staging import write_text

OUTPUT = Path("outputs/evaluation")
PAGE = ROOT / "docs" / "evaluation.md"
DATASET = "kt_sft_identity_eval"
DATA = Path("examples/data/kt_sft_identity_eval.json")
MAX_NEW_TOKENS = 40
METRICS = {
    "predict_bleu-4": "BLEU-4",
    "predict_rouge-1": "ROUGE-1",
    "predict_rouge-2": "ROUGE-2",
    "predict_rouge-l": "ROUGE-L",
}
SURFACES = {
    "`llamafactory-cli chat`": surfaces.chat,
    f"`llamafactory-cli api`, openai package, {surfaces.STREAMS} streams at a time": surfaces.api,
    "`kt-sft serve`, ollama package": surfaces.ollama,
}
RUN = """
import json, sys
from llamafactory.train.tuner import run_exp
for config in json.loads(sys.argv[1]):
    run_exp(config)
"""


@dataclass(frozen=True)
class Figures:
    """Of one model: metrics in percent, and the answers."""

    metrics: dict[str, float]
    accuracy: float | None
    answers: list[dict[str, str]]


def config(name: str, adapter: Path | None, rows: int, *, use_kt: bool, **changes: Any) -> dict[str, Any]:
    """A configuration for batch evaluation, from the training's keys."""
    keys = yaml.safe_load((ROOT / TRAIN_YAML).read_text(encoding="utf-8"))
    kept = ("model_name_or_path", "stage", "finetuning_type", "template", "default_system", "dataset_dir", "cutoff_len")
    values = {key: keys[key] for key in kept} | {
        "eval_dataset": DATASET,
        "max_samples": rows,
        "output_dir": str(OUTPUT / name),
        "overwrite_output_dir": True,
        "preprocessing_num_workers": 1,
        "per_device_eval_batch_size": 13,
        "report_to": "none",
        "bf16": True,
        "use_cpu": True,
    }
    if use_kt:
        values |= {"use_kt": True, "kt_method": keys["kt_method"]}
    if adapter is not None:
        values["adapter_name_or_path"] = str(adapter)
    return values | changes


def predicting(name: str, adapter: Path | None, rows: int, *, use_kt: bool = True) -> dict[str, Any]:
    greedy = {"predict_with_generate": True, "do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}
    return config(name, adapter, rows, use_kt=use_kt, do_predict=True, **greedy)


def scoring(name: str, adapter: Path | None, rows: int) -> dict[str, Any]:
    return config(f"{name}_accuracy", adapter, rows, use_kt=True, do_eval=True, compute_accuracy=True)


def run(configs: list[dict[str, Any]], *, use_kt: bool) -> None:
    """LLaMA-Factory in a process of its own, with or without kt_sft in it."""
    environment = {name: value for name, value in os.environ.items() if name != "USE_KT"}
    environment |= {"USE_KT": "1"} if use_kt else {}
    log = ROOT / OUTPUT / ("with_kt.log" if use_kt else "without_kt.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as sink:
        command = [sys.executable, "-c", RUN, json.dumps(configs)]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT)
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise SystemExit("\n".join([*lines[-15:], f"evaluation failed with exit status {done.returncode}; see {log}"]))


def figures(name: str, *, scored: bool = True) -> Figures:
    """What a run left behind."""
    folder = ROOT / OUTPUT / name
    found = json.loads((folder / "predict_results.json").read_text(encoding="utf-8"))
    lines = (folder / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    accuracy = None
    if scored:
        values = json.loads((ROOT / OUTPUT / f"{name}_accuracy" / "eval_results.json").read_text(encoding="utf-8"))
        accuracy = 100 * values["eval_accuracy"]
    return Figures({key: found[key] for key in METRICS}, accuracy, [json.loads(line) for line in lines])


def talking(adapter: Path) -> Path:
    """The configuration of chat and servers; answers are those of batch evaluation but for its batches."""
    keys = yaml.safe_load((ROOT / TRAIN_YAML).read_text(encoding="utf-8"))
    kept = ("finetuning_type", "template", "default_system", "kt_method")
    values = {key: keys[key] for key in kept} | {
        "model_name_or_path": str(ROOT / keys["model_name_or_path"]),
        "adapter_name_or_path": str(ROOT / adapter),
        "use_kt": True,
        "infer_dtype": "bfloat16",
        "do_sample": False,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    file = ROOT / OUTPUT / "talk.yaml"
    write_text(file, yaml.safe_dump(values))
    return file


def same_answers(ours: list[str], others: list[str]) -> int:
    return sum(a.strip() == b.strip() for a, b in zip(ours, others, strict=True))


def page(
    before: Figures, after: Figures, stock: Figures, divergences: list[Divergence], spoken: dict[str, list[str]]
) -> str:
    """docs/evaluation.md."""
    rows = len(after.answers)
    ours, labels = ([row[key] for row in after.answers] for key in ("predict", "label"))
    same = same_answers(ours, [row["predict"] for row in stock.answers])
    head = "|".join(f" {name} " for name in METRICS.values())

    def line(name: str, of: Figures) -> str:
        cells = [f"{of.metrics[key]:.1f}" for key in METRICS]
        return f"| {name} | {' | '.join([*cells, '' if of.accuracy is None else f'{of.accuracy:.1f} %'])} |"

    text = [
        "# The demo model, evaluated",
        "",
        "Written by `make evaluate` (scripts/demo/evaluate.py). LLaMA-Factory's batch evaluation (`do_predict` with",
        f"`predict_with_generate`, greedy; `do_eval` with `compute_accuracy`) of {rows} questions that are not in the",
        "training data; the model and the adapter are those of `make demo`, in bf16.",
        "",
        f"| model |{head}| accuracy of the next token |",
        "|---|" + "---:|" * (len(METRICS) + 1),
        line("before", before),
        line("fine-tuned", after),
        line("fine-tuned, without kt_sft: stock LLaMA-Factory, transformers, PEFT", stock),
        "",
        "The fine-tuned model again, through what users talk to, one question at a time but for the streams of `api`.",
        "Outside the experts, products of a batch may round otherwise than those of one question: up to a tenth of the",
        "answers may part where two tokens are as good as equal.",
        "",
        "| asked through | the very answer of batch evaluation | the very text of the data |",
        "|---|---:|---:|",
        *(
            f"| {name} | {same_answers(ours, answers)} of {rows} | {same_answers(labels, answers)} of {rows} |"
            for name, answers in {"batch evaluation": ours, **spoken}.items()
        ),
        "",
        "## The same tokens as without kt_sft",
        "",
        f"{same} of {rows} answers are the same to the last token. The others part at a step where the",
        "reference is undecided: the margin between its two best tokens is less than what rounding to bf16 does to its",
        "own logits there (twice the largest difference of a logit between bf16 and f32: both sides round). One answer",
        f"more or less that meets its text is worth up to {100 / rows:.1f} points of a metric above.",
        "",
        "| question | step | tokens | margin | bound |",
        "|---|---:|---|---:|---:|",
        *(
            f"| {d.question} | {d.step} | {d.ours!r}, {d.reference!r} | {d.margin:.3f} | {d.bound:.3f} |"
            for d in divergences
        ),
    ]
    return "\n".join(text) + "\n"


def faults(before: Figures, after: Figures, divergences: list[Divergence], spoken: dict[str, list[str]]) -> list[str]:
    """What is not as it should be."""
    found = []
    if after.metrics["predict_rouge-l"] < before.metrics["predict_rouge-l"] + 20:
        found.append("fine-tuning raised ROUGE-L by less than 20 points")
    ours = [row["predict"] for row in after.answers]
    found += [
        f"{name}: more than a tenth of the answers differ from those of batch evaluation"
        for name, answers in spoken.items()
        if same_answers(ours, answers) < 0.9 * len(ours)
    ]
    found += [
        f"{d.question}: margin {d.margin:.3f} at step {d.step}, rounding explains {d.bound:.3f}"
        for d in divergences
        if d.margin > d.bound
    ]
    return found


def main(
    rows: Annotated[int, typer.Option(help="Questions to ask.")] = 52,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of the adapter; default: the training example's.")
    ] = None,
) -> None:
    """Evaluate the demo model before and after its fine-tuning, and against the path without kt_sft."""
    console = Console()
    keys = yaml.safe_load((ROOT / TRAIN_YAML).read_text(encoding="utf-8"))
    adapter = adapter or Path(keys["output_dir"])
    if not (ROOT / adapter / "adapter_model.safetensors").exists():
        raise SystemExit(f"{adapter}: no adapter there; run `make demo` first")
    with console.status("predicting with kt_sft, before and after ..."):
        pairs = (("before", None), ("after", adapter))
        run([make(name, which, rows) for name, which in pairs for make in (predicting, scoring)], use_kt=True)
    with console.status("predicting without kt_sft ..."):
        run([predicting("stock", adapter, rows, use_kt=False)], use_kt=False)
    before, after, stock = figures("before"), figures("after"), figures("stock", scored=False)
    with console.status("looking at answers that differ ..."):
        questions = [row["instruction"] for row in json.loads((ROOT / DATA).read_text(encoding="utf-8"))]
        different = [
            Pair(question, ours["prompt"], ours["predict"], other["predict"])
            for question, ours, other in zip(questions, after.answers, stock.answers)
            if ours["predict"] != other["predict"]
        ]
        divergences = explain(ROOT / keys["model_name_or_path"], ROOT / adapter, different)
    spoken, file = {}, talking(adapter)
    for name, ask in SURFACES.items():
        with console.status(f"asking through {name} ..."):
            spoken[name] = ask(file, questions[: len(after.answers)])
    text = page(before, after, stock, divergences, spoken)
    write_text(PAGE, text)
    console.print(text, markup=False, highlight=False)
    if found := faults(before, after, divergences, spoken):
        raise SystemExit("\n".join(f"error: {fault}" for fault in found))


if __name__ == "__main__":
    typer.run(main)
