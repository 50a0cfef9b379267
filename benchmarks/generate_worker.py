"""Processes of bench_generate: each holds models of one library and generates with them when it is told to.

kt_sft and transformers do not share a process, for each sets up torch's threads as it likes. Requests and answers are
lines of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor

OURS, TORCH_BF16, TORCH_FP32 = "kt_sft BF16", "transformers eager, bf16", "transformers eager, fp32"
LINEARS = {"BF16": "bf16", "INT8": "int8", "INT4": "int8"}  # cpu_linear beside each method


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
    """A model that generates, under the name of a contender; `prepare` is called before each use of one that serves
    several contenders."""

    name: str
    model: Any
    prepare: Callable[[], None] = lambda: None

    def generate(self, prompt: Tensor, count: int) -> dict[str, float]:
        """Seconds to the first token, and the median of those between two."""
        self.prepare()
        clock = Clock()
        start = time.perf_counter()
        self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), streamer=clock, do_sample=False, pad_token_id=0,
            max_new_tokens=count, min_new_tokens=count,
        )  # fmt: skip
        tokens = clock.times[1:]  # the prompt is put first
        return {"first": tokens[0] - start, "seconds": median(after - before for before, after in pairwise(tokens))}

    @torch.inference_mode()
    def logits(self, prompt: Tensor) -> list[float]:
        """Of the last position."""
        self.prepare()
        return self.model(prompt).logits[0, -1].float().tolist()


def ours(folder: Path, methods: list[str], threads: int) -> list[Loaded]:
    import kt_sft

    made = []
    for method in methods:
        config = kt_sft.KTConfig(method=method, cpu_linear=LINEARS[method], threads=threads)
        model = kt_sft.load_model(folder, config, dtype=torch.bfloat16).eval()
        made.append(Loaded(f"kt_sft {method}" + ("" if method == "BF16" else f", linears {LINEARS[method]}"), model))
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


def serve(models: list[Loaded]) -> None:
    """Answer requests until their end."""
    by_name = {one.name: one for one in models}
    print(json.dumps(list(by_name)), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "float":  # the bf16 model in fp32, in its place: there may be no room for both
            eager = by_name[TORCH_BF16]
            by_name = {TORCH_FP32: Loaded(TORCH_FP32, eager.model.float(), eager.prepare)}
            answer: Any = list(by_name)
        else:
            one, prompt = by_name[asked["name"]], torch.tensor([asked["prompt"]])
            answer = one.logits(prompt) if asked["do"] == "logits" else one.generate(prompt, asked["tokens"])
        print(json.dumps(answer), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate_worker", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--methods", nargs="*", help="kt_sft with these; without any: transformers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    serve(ours(options.folder, options.methods, options.threads) if options.methods else stock(options.folder))


if __name__ == "__main__":
    main()
