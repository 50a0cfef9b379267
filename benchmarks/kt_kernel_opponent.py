"""kt-kernel as an opponent, if installed. It lives in a subprocess that is stopped except while its sample runs: its
import pins CPU features and threads, and its workers spin.

Where it is installed is an option or the variable KT_KERNEL_PYTHON: a Python interpreter that has kt-kernel and torch,
or a folder made by `pip install --no-deps --target FOLDER kt-kernel==0.7.2`, which this Python then reads first.
Forward without LoRA only: on CPUs without AMX it has no other path.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import problem
from benchmarks.contest import BASE_ONLY, Contestant, LayerBench
from benchmarks.problem import Batch, Layer
from benchmarks.roofline import last_level_cache_bytes
from benchmarks.session import Session

WORKER = Path(__file__).with_name("kt_kernel_worker.py")
VARIABLE = "KT_KERNEL_PYTHON"
METHODS = ("bf16", "int8", "int4")
# Its int4 is per channel where it has the class for it.
MAX_ERROR = {"bf16": 3e-2, "int8": 6e-2, "int4": 0.5}
ANSWER_SECONDS = 120.0


class KtKernelMissing(RuntimeError):
    """kt-kernel cannot run here; the message is the reason."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kt-kernel-python",
        default=os.environ.get(VARIABLE, ""),
        metavar="PATH",
        help=f"Python or folder that has kt-kernel (default: ${VARIABLE}, else this Python)",
    )


class KtKernel:
    """The worker process."""

    def __init__(self, where: str, variant: str = "") -> None:
        python, environment = sys.executable, dict(os.environ, OMP_NUM_THREADS="1")
        if where and Path(where).is_dir():
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (where, environment.get("PYTHONPATH"))))
        elif where:
            python = where
        elif importlib.util.find_spec("kt_kernel") is None:
            raise KtKernelMissing("not installed (--kt-kernel-python)")
        if variant:
            environment["KT_KERNEL_CPU_VARIANT"] = variant
        self._folder = tempfile.TemporaryDirectory(prefix="kt_kernel_")
        try:
            self._process = subprocess.Popen(
                [python, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        except OSError as fault:
            self._folder.cleanup()
            raise KtKernelMissing(f"{where}: {fault.strerror}") from fault
        try:
            hello = self._answer()
        except KtKernelMissing:
            self.close()
            raise
        self.name = f"kt-kernel {hello['version']} ({hello['variant']})"
        self._batches: dict[int, tuple[str, object]] = {}

    def _answer(self) -> dict:
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_SECONDS)
        line = self._process.stdout.readline() if ready else ""
        self._signal(signal.SIGSTOP)
        if not line:
            raise KtKernelMissing(f"no answer within {ANSWER_SECONDS:.0f} s" if not ready else "its process died")
        answer = json.loads(line)
        if "fault" in answer:
            raise KtKernelMissing(answer["fault"])
        return answer

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def ask(self, what: str, **arguments: object) -> dict:
        """Let the process run until it has done this.

        Raises:
            KtKernelMissing: it could not.
        """
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as fault:
            raise KtKernelMissing("its process died") from fault
        return self._answer()

    def load(self, layer: Layer, threads: int, nodes: int, tokens: int) -> dict[str, dict]:
        path = self.path("layer")
        torch.save({"gate_up": layer.gate_up, "down": layer.down, "top_k": layer.shape.top_k}, path)
        answers = self.ask(
            "load",
            path=path,
            methods=METHODS,
            threads=threads,
            nodes=nodes,
            tokens=tokens,
            flush_bytes=2 * last_level_cache_bytes(),
        )
        Path(path).unlink()
        return answers

    def path(self, name: str) -> str:
        return str(Path(self._folder.name) / f"{name}.pt")

    def batch_key(self, tensors: tuple[Tensor, Tensor, Tensor]) -> str:
        """Name of this input in the worker, which gets it at its first use."""
        key = id(tensors[0])
        if key not in self._batches:
            name = f"batch{len(self._batches)}"
            torch.save(tensors, self.path(name))
            self.ask("batch", key=name, path=self.path(name))
            self._batches[key] = (name, tensors)  # held, so that its id stays its own
        return self._batches[key][0]

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()


class KtKernelLayer:
    """One method of a loaded layer as a contestant; the time is the worker's own."""

    def __init__(self, host: KtKernel, method: str) -> None:
        self._host, self._method = host, method
        self.last_seconds = 0.0

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        key = self._host.batch_key((x, topk_ids, topk_weights))
        out = self._host.path("out")
        self.last_seconds = self._host.ask("forward", method=self._method, key=key, out=out)["seconds"]
        return torch.load(out)

    def input_of(self, batch: Batch) -> Tensor:
        return batch.x

    def lora_leaves(self) -> list[Tensor]:
        return []

    def canonical(self, gradients: list[Tensor]) -> list[Tensor]:
        return gradients


@contextlib.contextmanager
def joined(
    bench: LayerBench, options: argparse.Namespace, running: Session, tokens: int, variant: str = ""
) -> Iterator[None]:
    """The bench with kt-kernel's methods as contestants, as far as they run here; reasons go to bench.missing."""
    host = None
    nodes = max(1, int(str(running.machine["numa_nodes"])))
    names = {method: f"kt-kernel {method}" for method in METHODS}
    try:
        host = KtKernel(options.kt_kernel_python, variant)
        answers = host.load(bench.layer, running.threads, min(nodes, running.threads), tokens)
    except KtKernelMissing as reason:
        bench.missing.update({name: str(reason) for name in names.values()})
        answers = {}
    base = bench.contestants[BASE_ONLY].layer if BASE_ONLY in bench.contestants else problem.with_rank(bench.layer, 0)
    for method, answer in answers.items():
        if "reason" in answer:
            bench.missing[names[method]] = answer["reason"]
            continue
        weight_bytes = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}[method]
        contestant = Contestant(KtKernelLayer(host, method), base, MAX_ERROR[method], weight_bytes, forward_only=True)
        bench.add(names[method], contestant)
    try:
        yield
    finally:
        if host is not None:
            host.close()
