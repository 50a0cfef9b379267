"""kt-kernel in a process of its own: run by benchmarks/kt_kernel_opponent.py with a Python that has kt-kernel.

Reads one JSON object a line from standard input and answers each with one on the original standard output; whatever
the library itself prints goes to standard error. Imports nothing of this repository.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time

# First choice first. The grouped int4 classes take packed nibbles, the others quantise bf16 weights themselves.
CLASSES = {
    "bf16": ("AMXBF16_MOE", "AVX2BF16_MOE"),
    "int8": ("AMXInt8_MOE",),
    "int4": ("AMXInt4_MOE", "AVX2RawInt4_MOE"),
}
GROUP_SIZE = 32


class Worker:
    def __init__(self) -> None:
        import kt_kernel
        import torch

        self.torch, self.variant = torch, str(kt_kernel.__cpu_variant__)
        self.version, self.native = kt_kernel.__version__, kt_kernel.kt_kernel_ext
        self.modules, self.batches, self.keep, self.flush = {}, {}, [], None
        torch.set_num_threads(1)

    def load(self, path: str, methods: list[str], threads: int, nodes: int, tokens: int, flush_bytes: int) -> dict:
        """Build the layer of `path` (a torch file) in every method that this variant has."""
        data = self.torch.load(path)
        gate, up = (one.contiguous() for one in data["gate_up"].chunk(2, 1))  # [experts, inter, hidden]
        weights = {"gate": gate, "up": up, "down": data["down"]}
        config = self.native.WorkerPoolConfig()
        config.subpool_count, config.subpool_numa_map = nodes, list(range(nodes))
        config.subpool_thread_count = [threads // nodes + (index < threads % nodes) for index in range(nodes)]
        self.cpu = self.native.CPUInfer(config)
        self.top_k = data["top_k"]
        self.flush = self.torch.ones(flush_bytes // 8, dtype=self.torch.float64)
        answers = {}
        for method in methods:
            name = next((one for one in CLASSES[method] if hasattr(self.native.moe, one)), None)
            if name is None:
                answers[method] = {"reason": f"its {self.variant} variant has no {' or '.join(CLASSES[method])}"}
                continue
            self.modules[method] = self._build(name, weights, tokens)
            answers[method] = {"class": name}
        return answers

    def _build(self, name: str, weights: dict, tokens: int) -> object:
        experts, inter, hidden = weights["gate"].shape
        mask = self.torch.zeros(experts, dtype=self.torch.bool)
        order = self.torch.arange(experts)
        config = self.native.moe.MOEConfig(experts, self.top_k, hidden, inter, mask.data_ptr())
        config.layer_idx, config.pool, config.max_len = 0, self.cpu.backend_, max(tokens, 1)
        for key, tensor in weights.items():
            scales = [0] * experts
            if name == "AVX2RawInt4_MOE":
                tensor, scale = self._nibbles(tensor)
                scales = [one.data_ptr() for one in scale]
                self.keep.append(scale)
                config.quant_config.bits, config.quant_config.group_size = 4, GROUP_SIZE
                config.quant_config.zero_point = False
            if name in ("AMXInt8_MOE", "AMXInt4_MOE"):
                setattr(config, f"{key}_proj", tensor.data_ptr())
            else:
                setattr(config, f"{key}_projs", [[one.data_ptr() for one in tensor]])
                setattr(config, f"{key}_scales", [scales])
            self.keep.append(tensor)
        self.keep += [mask, order]
        module = getattr(self.native.moe, name)(config)
        self.cpu.submit(module.load_weights_task(order.data_ptr()))
        self.cpu.sync(0)
        return module

    def _nibbles(self, weight: object) -> tuple:
        """Symmetric int4 in groups along the last axis: bytes of two values + 8, low half first; bf16 scales."""
        groups = weight.float().unflatten(-1, (-1, GROUP_SIZE))  # [experts, n, groups, group]
        scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-30).bfloat16()
        q = (groups / scale.float()).round().clamp(-8, 7).to(self.torch.int16).add(8).flatten(-2).to(self.torch.uint8)
        return (q[..., ::2] | q[..., 1::2] << 4).contiguous(), scale.squeeze(-1).contiguous()

    def batch(self, key: str, path: str) -> dict:
        self.batches[key] = self.torch.load(path)
        return {}

    def forward(self, method: str, key: str, out: str) -> dict:
        """One pass with cold weights: a pass on one token wakes the threads, reading `flush` empties the cache."""
        x, ids, weights = self.batches[key]
        result = self.torch.empty_like(x)
        self._run(self.modules[method], x[:1], ids[:1], weights[:1], self.torch.empty_like(x[:1]))
        self.flush.sum()
        start = time.perf_counter()
        self._run(self.modules[method], x, ids, weights, result)
        seconds = time.perf_counter() - start
        self.torch.save(result, out)
        return {"seconds": seconds}

    def _run(self, module: object, x: object, ids: object, weights: object, out: object) -> None:
        count = self.torch.tensor([x.shape[0]], dtype=self.torch.int32)
        pointers = [one.data_ptr() for one in (ids, weights, x, out)]
        self.cpu.submit(module.forward_task(count.data_ptr(), ids.shape[1], *pointers, False))
        self.cpu.sync(0)


def main() -> None:
    # A stopped process would outlive its parent: prctl(PR_SET_PDEATHSIG, SIGKILL).
    ctypes.CDLL(None).prctl(1, 9)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        worker = Worker()
        answer = {"version": worker.version, "variant": worker.variant}
    except Exception as fault:  # whatever a foreign library raises at import is the reason that the report names
        answer = {"fault": f"{type(fault).__name__}: {fault}"}
    print(json.dumps(answer), file=answers, flush=True)
    for line in sys.stdin if "fault" not in answer else ():
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as fault:
            answer = {"fault": f"{type(fault).__name__}: {fault}"}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # its worker threads outlive a normal exit


if __name__ == "__main__":
    main()
