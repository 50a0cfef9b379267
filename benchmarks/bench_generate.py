"""Tokens per second of whole models, generating greedily: `python -m benchmarks.bench_generate`.

A random checkpoint with Qwen3-30B-A3B's layers (real sizes, fewer of them, vocabulary 32000) through kt_sft and through
transformers: its `eager` attention and experts in bf16 and in fp32, and its default ones. Seconds per token are those
of the tokens after the first. One token reads each active weight once, so no way of computing in bf16 can be faster
than reading them: the share of that limit is shown. The demo model, if `make demo` has built it, is measured likewise.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from benchmarks import session
from benchmarks.checkpoints import qwen3_30b, write_checkpoint
from benchmarks.generate_worker import LINEARS, OURS, TORCH_BF16, TORCH_FP32
from benchmarks.harness import ROOT, Contender, Work, run_interleaved, summarise
from benchmarks.worker import Worker

DEMO = ROOT / "outputs" / "models" / "tiny_moe"
TARGETS = {TORCH_BF16: 3.0, TORCH_FP32: 2.0}  # times our tokens per second
MAX_LOGIT_ERROR = 0.25  # relative: random routers are often undecided, so rounding changes experts; wrong weights: 1.4
PROMPT = 64


def start(folder: Path, threads: int, methods: list[str]) -> tuple[Worker, list[str]]:
    """A process that holds models, and their names. Its environment says nothing about OpenMP, so that each library has
    torch's threads as its users have them."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    words = ["--methods", *methods] if methods else []
    worker = Worker("generate_worker", folder, "--threads", threads, *words, environment=environment)
    return worker, worker.answer()


def token_bytes(config: transformers.PreTrainedConfig) -> int:
    """Bytes of weights that one token reads at least, in bf16."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    count = 0
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            count += parameter.numel() * config.num_experts_per_tok // parameter.shape[0]
        elif parameter.dim() > 1 and (parameter is not model.get_input_embeddings().weight):
            count += parameter.numel()
    head = model.get_output_embeddings().weight
    return 2 * (count + (head.numel() if head is model.get_input_embeddings().weight else 0))


def check(workers: Mapping[str, Worker], prompt: list[int]) -> None:
    """Raise unless all contenders in bf16 mean the same model.

    Raises:
        RuntimeError: one computes other logits.
    """
    reference = None
    for name, worker in workers.items():
        if "int" not in name:
            logits = torch.tensor(worker.ask(do="logits", name=name, prompt=prompt))
            reference = logits if reference is None else reference
            error = ((logits - reference).norm() / reference.norm()).item()
            if error > MAX_LOGIT_ERROR:
                raise RuntimeError(f"{name}: logits differ by {error:.1%} from those of {OURS}")


def time_all(
    workers: Mapping[str, Worker], prompts: list[list[int]], work: Work, running: session.Session, tokens: int
) -> list[dict[str, Any]]:
    """A summary of each, in rounds that all share; the first is what the others are compared with."""
    firsts: dict[str, list[float]] = {name: [] for name in workers}

    def run(name: str, index: int) -> float:
        found = workers[name].ask(do="generate", name=name, prompt=prompts[index], tokens=tokens)
        firsts[name].append(found["first"])
        return found["seconds"]

    runs = [Contender(name, lambda i, name=name: run(name, i), 1.0, reports_seconds=True) for name in workers]
    samples = run_interleaved(runs, running.roofline.probe, [len(prompts)] * len(runs))
    found = []
    for name in workers:
        summary = summarise(name, samples[name], work, samples[OURS])
        found.append({**asdict(summary), "tokens_per_second": 1e3 / summary.median_ms, "first": median(firsts[name])})
    return found


def measure(what: str, folder: Path, running: session.Session, options: argparse.Namespace) -> dict[str, Any]:
    """One line group of the table."""
    config = transformers.AutoConfig.from_pretrained(folder)
    prompts = torch.randint(10, config.vocab_size - 10, (options.rounds, PROMPT)).tolist()
    work = Work(flops=0.0, bytes=token_bytes(config))
    with ExitStack() as stack:

        def held(until: ExitStack, methods: list[str]) -> dict[str, Worker]:
            worker, names = start(folder, running.threads, methods)
            return dict.fromkeys(names, until.enter_context(worker))

        first, bf16 = held(stack, options.methods[:1]), held(stack, [])
        check({**first, **bf16}, prompts[0])
        with ExitStack() as until_fp32:  # which needs their room
            quantised = [held(until_fp32, [method]) for method in options.methods[1:]]
            together = {name: worker for part in (first, *quantised, bf16) for name, worker in part.items()}
            rows = time_all(together, prompts, work, running, options.tokens)
        other = bf16[TORCH_BF16]
        fp32 = dict.fromkeys(other.ask(do="float"), other)
        rows += time_all({**first, **fp32}, prompts, work, running, options.tokens)[1:]
    sizes = {"layers": config.num_hidden_layers, "vocab_size": config.vocab_size, "prompt": PROMPT}
    return {"model": what, **sizes, "tokens": options.tokens, "token_bytes": work.bytes, "contenders": rows}


HEADINGS = ["", "tokens/s", "ms per token", "time / kt_sft BF16's", "bf16 weights read, of DRAM", "first token, s"]


def rows_of(case: Mapping[str, Any]) -> list[list[str]]:
    """Cells of the table."""
    return [
        [
            one["name"],
            f"{one['tokens_per_second']:.1f}",
            f"{one['median_ms']:.1f}",
            f"{one['ratio']:.2f} x",
            f"{one['dram_fraction']:.0%}" if one["name"] in (OURS, TORCH_BF16) else "",
            f"{one['first']:.2f}",
        ]
        for one in case["contenders"]
    ]


def title_of(case: Mapping[str, Any]) -> str:
    return (
        f"{case['model']}, {case['layers']} layers, vocabulary {case['vocab_size']}, prompt of {case['prompt']} tokens"
    )


def misses(case: Mapping[str, Any]) -> list[str]:
    """Targets that are not reached."""
    return [
        f"{one['name']}: {one['ratio']:.2f} x, wanted {TARGETS[one['name']]:.0f} x"
        for one in case["contenders"]
        if one["name"] in TARGETS and one["ratio"] < TARGETS[one["name"]]
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_generate", description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4, help="of Qwen3-30B-A3B's 48, 1.2 GB each in bf16 (default 4)")
    parser.add_argument("--methods", nargs="+", default=list(LINEARS), choices=list(LINEARS))
    parser.add_argument("--tokens", type=int, default=24, help="generated per run (default 24)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default 5)")
    parser.add_argument("--folder", type=Path, help="where the checkpoint goes for the time being")
    session.add_options(parser)
    options = parser.parse_args(arguments)
    if options.methods[0] != "BF16":
        parser.error("--methods: BF16 comes first, all are compared with it")
    running = session.open_session(options, "generate", f"{options.layers} layers")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place) / "checkpoint"
        write_checkpoint(folder, qwen3_30b(options.layers))
        cases = [measure("Qwen3-30B-A3B shape", folder, running, options)]
    if (DEMO / "config.json").is_file():
        cases.append(measure("demo model", DEMO, running, options))
    for case in cases:
        running.show(title_of(case), HEADINGS, rows_of(case))
    return running.finish(cases, misses(cases[0]))


if __name__ == "__main__":
    sys.exit(session.run_command(main))
