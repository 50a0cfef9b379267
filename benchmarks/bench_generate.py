"""Tokens per second of whole models, generating greedily: `python -m benchmarks.bench_generate`.

A random checkpoint with Qwen3-30B-A3B's layers (real sizes, fewer of them, vocabulary 32000) through kt_sft and through
transformers: its `eager` attention and experts in bf16 and in fp32, and its default ones. Seconds per token are those
of the tokens after the first. One token reads each active weight once, so no way of computing in bf16 can be faster
than reading them: the share of that limit is shown. The demo model, if `make demo` has built it, is measured likewise.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from rich.table import Table
from torch import Tensor

import kt_sft
from benchmarks import session
from benchmarks.checkpoints import qwen3_30b, write_checkpoint
from benchmarks.harness import ROOT, Contender, Work, run_interleaved, summarise
from kt_sft.models.spec import iter_routed_experts

DEMO = ROOT / "outputs" / "models" / "tiny_moe"
LINEARS = {"BF16": "bf16", "INT8": "int8", "INT4": "int8"}  # cpu_linear beside each method
OURS, TORCH_BF16, TORCH_FP32 = "kt_sft BF16", "transformers eager, bf16", "transformers eager, fp32"
TARGETS = {TORCH_BF16: 3.0, TORCH_FP32: 2.0}  # times our tokens per second
MAX_LOGIT_ERROR = 0.25  # relative: random routers are often undecided, so rounding changes experts; wrong weights: 1.4
PROMPT = 64


class Clock(transformers.generation.streamers.BaseStreamer):
    """Notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass
class Loaded:
    """A model that generates, under the name of a contender.

    Args:
        prepare: called before each use; one model may serve several contenders.
        first: seconds to the first token, one per run.
    """

    name: str
    model: Any
    prepare: Callable[[], None]
    first: list[float] = field(default_factory=list)

    def seconds_per_token(self, prompt: Tensor, count: int) -> float:
        """Median over the tokens after the first."""
        self.prepare()
        clock = Clock()
        start = time.perf_counter()
        self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), streamer=clock, do_sample=False, pad_token_id=0,
            max_new_tokens=count, min_new_tokens=count,
        )  # fmt: skip
        tokens = clock.times[1:]  # the prompt is put first
        self.first.append(tokens[0] - start)
        return median(after - before for before, after in pairwise(tokens))


def ours(folder: Path, methods: Iterable[str]) -> list[Loaded]:
    made = []
    for method in methods:
        config = kt_sft.KTConfig(method=method, cpu_linear=LINEARS[method])
        model = kt_sft.load_model(folder, config, dtype=torch.bfloat16).eval()
        name = f"kt_sft {method}" + ("" if LINEARS[method] == "bf16" else f", linears {LINEARS[method]}")
        made.append(Loaded(name, model, lambda: None))
    return made


def stock(folder: Path) -> list[Loaded]:
    """transformers' bf16 model, as two contenders."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    chosen = model.config._attn_implementation, model.config._experts_implementation
    return [
        Loaded(TORCH_BF16, model, partial(choose, model, "eager", "eager")),
        Loaded(f"transformers {'/'.join(chosen)}, bf16", model, partial(choose, model, *chosen)),
    ]


def choose(model: Any, attention: str, experts: str) -> None:
    model.set_attn_implementation(attention)
    model.set_experts_implementation(experts)


def token_bytes(model: Any) -> int:
    """Bytes of weights that one token reads at least, in bf16."""
    embedding = model.get_input_embeddings()
    linears = [m for m in model.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")]
    dense = sum(2 * m.in_features * m.out_features for m in linears if m is not embedding)
    routed = sum(
        2 * 3 * module.hidden_dim * module.intermediate_dim * model.config.num_experts_per_tok
        for _, module in iter_routed_experts(model)
    )
    return dense + routed


@torch.inference_mode()
def check(contenders: list[Loaded], prompt: Tensor) -> None:
    """Raise unless all bf16 contenders mean the same model.

    Raises:
        RuntimeError: one computes other logits.
    """
    reference = None
    for one in contenders:
        one.prepare()
        logits = one.model(prompt).logits.float()
        reference = logits if reference is None else reference
        error = ((logits - reference).norm() / reference.norm()).item()
        if error > MAX_LOGIT_ERROR:
            raise RuntimeError(f"{one.name}: logits differ by {error:.1%} from those of {contenders[0].name}")


def time_all(
    contenders: list[Loaded], prompts: Tensor, work: Work, running: session.Session, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A summary of each, in rounds that all share; the first is what the others are compared with."""
    runs = [
        Contender(
            one.name,
            lambda index, one=one: one.seconds_per_token(prompts[index], options.tokens),
            1.0,
            reports_seconds=True,
        )
        for one in contenders
    ]
    samples = run_interleaved(runs, running.roofline.probe, [options.rounds] * len(runs))
    found = []
    for one in contenders:
        summary = summarise(one.name, samples[one.name], work, samples[contenders[0].name])
        found.append({**asdict(summary), "tokens_per_second": 1e3 / summary.median_ms, "first": median(one.first)})
    return found


def measure(what: str, folder: Path, running: session.Session, options: argparse.Namespace) -> dict[str, Any]:
    """One line group of the table."""
    first, *quantised = ours(folder, options.methods)
    config = first.model.config
    prompts = torch.randint(10, config.vocab_size - 10, (options.rounds + 1, 1, PROMPT))
    work = Work(flops=0.0, bytes=token_bytes(first.model))
    timed = partial(time_all, prompts=prompts, work=work, running=running, options=options)
    eager, default = stock(folder)
    check([first, eager, default], prompts[0])
    rows = timed([first, *quantised, eager, default])
    del quantised, default  # room for the weights in fp32
    gc.collect()
    fp32 = Loaded(TORCH_FP32, eager.model.float(), eager.prepare)
    rows += timed([first, fp32])[1:]
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
        table = Table(title=title_of(case), title_justify="left")
        for column in HEADINGS:
            table.add_column(column, justify="right" if column else "left")
        for row in rows_of(case):
            table.add_row(*row)
        running.console.print(table)
    faults = misses(cases[0])
    for fault in faults:
        running.console.print(f"MISS {fault}")
    running.save(cases)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(session.run_command(main))
