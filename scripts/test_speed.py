"""`kt-sft bench serve` under another name, with `--prompt_lens` and the like understood as `--prompt-lens`.

usage: test_speed.py --api-url URL --model NAME --prompt-lens 1024 --max-tokens 512 --concurrent 4
"""

from __future__ import annotations

import sys

import typer

from kt_sft.cli.serve import bench_serve


def with_dashes(word: str) -> str:
    """`--prompt_lens=1_0` -> `--prompt-lens=1_0`."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


if __name__ == "__main__":
    sys.argv[1:] = [with_dashes(word) for word in sys.argv[1:]]
    typer.run(bench_serve)
