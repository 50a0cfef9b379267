"""Processes of bench_loading: one converts, others load and stay, so that their memory can be looked at."""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def mapped_kib(folder: Path, key: str, pid: int | str = "self") -> int:
    """Sum of `key` (Rss, Pss) over a process's mappings of the files below a folder."""
    total, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            inside = str(folder) in rest
        elif inside and first == f"{key}:":
            total += int(rest.split()[0])
    return total


def rss_kib(pid: int | str = "self") -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


class Peak:
    """The largest resident memory beside the mapped files of a folder, looked at every 50 ms."""

    def __init__(self, folder: Path):
        self.kib, self._folder, self._stop = 0, folder, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            # Pages may come between the two looks: the mapping's are counted before and after.
            before, rss = mapped_kib(self._folder, "Rss"), rss_kib()
            self.kib = max(self.kib, rss - max(before, mapped_kib(self._folder, "Rss")))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@contextlib.contextmanager
def _no_bar(what: str, total: int) -> Iterator:
    yield lambda done, all_, layer: None


def convert(folder: Path, source: Path, output: Path, method: str) -> dict[str, object]:
    from kt_sft import KTConfig
    from kt_sft.integrations.transformers.converting import convert_checkpoint

    start = time.perf_counter()
    with Peak(folder) as peak:
        result = convert_checkpoint(source, output, KTConfig(method=method), bar=_no_bar)
    errors = {name: round(typical, 6) for name, (typical, _) in result.manifest.errors().items()}
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_kib": peak.kib, "bytes": result.manifest.blob_bytes, "errors": errors}


def fresh_memory_seconds(size: int) -> float:
    """Seconds to write memory that no one has written before, in huge pages as packed weights have it.

    On a virtual machine the host has to find the pages as well, which can take ten times as long as to pack into them.
    """
    import torch

    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        start = time.perf_counter()
        torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
        return time.perf_counter() - start


def load(source: Path, packed: Path, method: str, cpu_linear: str) -> tuple[object, dict[str, object]]:
    """The model, seconds of load_model and of its parts, and seconds of the model's first pass."""
    import torch

    from kt_sft import KTConfig, load_model
    from kt_sft.integrations.transformers import loading as loading
    from kt_sft.nn.packed_linear import PackedLinear

    import_end = time.perf_counter()
    config = KTConfig(method=method, weight_path=packed, cpu_linear=cpu_linear)
    parts = {}

    def timed(part: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object) -> object:
            start = time.perf_counter()
            result = part(*args)
            parts[part.__name__] = time.perf_counter() - start
            return result

        return run

    loading.stream_experts, loading.pack_linears = timed(loading.stream_experts), timed(loading.pack_linears)
    model = load_model(source, config, dtype=torch.bfloat16)
    loaded = time.perf_counter()
    with torch.no_grad():
        ids = torch.randint(0, 1000, (1, 512), generator=torch.Generator().manual_seed(0))
        model(ids, logits_to_keep=1)  # enough tokens for every expert
    first_pass = time.perf_counter() - loaded
    packed_bytes = sum(one.packed_bytes for one in model.modules() if isinstance(one, PackedLinear))
    return model, {
        "seconds": loaded - import_end,
        "experts_seconds": parts["stream_experts"],
        "linears_seconds": parts["pack_linears"],
        "linears_bytes": packed_bytes,
        "fresh_memory_seconds": fresh_memory_seconds(packed_bytes) if packed_bytes else 0.0,
        "first_pass_seconds": first_pass,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("convert", "load"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("method")
    parser.add_argument("cpu_linear", nargs="?", default="off")
    options = parser.parse_args()
    model = None
    if options.what == "convert":
        answer = convert(options.folder, options.source, options.packed, options.method)
    else:
        model, answer = load(options.source, options.packed, options.method, options.cpu_linear)
    print(json.dumps(answer), flush=True)
    if model is not None:
        sys.stdin.read()  # stays until the parent has looked


if __name__ == "__main__":
    main()
