"""Matrix products by ggml through its C interface, in a process of its own: `python -m benchmarks.ggml_worker FOLDER`.

FOLDER holds libggml-base.so and libggml-cpu.so. Reads one JSON request a line, answers each with a line of JSON. A load
has "load": type, "n", "k", "m", "copies", "threads" and files: "file" with the blocks of W, "rows" with x, "result" for
the first y. A run has "run": number of products.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q4_k": 12, "q5_k": 13, "q6_k": 14}
TYPES |= {"iq4_nl": 20, "iq4_xs": 23, "bf16": 30, "mxfp4": 39}


class InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Plan(ctypes.Structure):
    """ggml_cplan."""

    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    )


class Ggml:
    """The few functions that a product takes."""

    def __init__(self, folder: Path):
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), ctypes.RTLD_GLOBAL)
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._declare("ggml_init", pointer, InitParams)
        self._declare("ggml_free", None, pointer)
        self._declare("ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, size, size)
        self._declare("ggml_get_data", pointer, pointer)
        self._declare("ggml_nbytes", ctypes.c_size_t, pointer)
        self._declare("ggml_mul_mat", pointer, pointer, pointer, pointer)
        self._declare("ggml_new_graph", pointer, pointer)
        self._declare("ggml_build_forward_expand", None, pointer, pointer)
        self.graph_plan, self.compute = self.cpu.ggml_graph_plan, self.cpu.ggml_graph_compute
        self.graph_plan.restype, self.graph_plan.argtypes = Plan, (pointer, ctypes.c_int, pointer)
        self.compute.restype, self.compute.argtypes = ctypes.c_int, (pointer, ctypes.POINTER(Plan))
        self.cpu.ggml_cpu_init()

    def _declare(self, name: str, result: object, *arguments: object) -> None:
        function = getattr(self.base, name)
        function.restype, function.argtypes = result, arguments
        setattr(self, name, function)


class Products:
    """y [m, n] = x [m, k] W^T for several copies of one W, in turn."""

    def __init__(self, ggml: Ggml, request: dict):
        self.ggml, self.threads = ggml, request["threads"]
        n, k, m = (request[name] for name in "nkm")
        blocks = Path(request["file"]).read_bytes()
        rows = Path(request["rows"]).read_bytes()  # f32 [m, k]
        tensors = 4 * m * (n + k) + (8 << 20)
        self.contexts, self.graphs, self.next = [], [], 0
        for _ in range(request["copies"]):
            context = ggml.ggml_init(InitParams(len(blocks) + tensors, None, False))
            w = ggml.ggml_new_tensor_2d(context, TYPES[request["load"]], k, n)
            if ggml.ggml_nbytes(w) != len(blocks):
                raise ValueError(f"{request['load']}: expected {ggml.ggml_nbytes(w)} bytes, got {len(blocks)}")
            ctypes.memmove(ggml.ggml_get_data(w), blocks, len(blocks))
            x = ggml.ggml_new_tensor_2d(context, TYPES["f32"], k, m)
            ctypes.memmove(ggml.ggml_get_data(x), rows, len(rows))
            y = ggml.ggml_mul_mat(context, w, x)
            graph = ggml.ggml_new_graph(context)
            ggml.ggml_build_forward_expand(graph, y)
            plan = ggml.graph_plan(graph, self.threads, None)
            work = ctypes.create_string_buffer(max(1, plan.work_size))
            plan.work_data = ctypes.addressof(work)
            self.contexts.append(context)
            self.graphs.append((graph, plan, work, y))

    def run(self, count: int) -> float:
        """Seconds of `count` products."""
        start = time.perf_counter()
        for _ in range(count):
            graph, plan, _, _ = self.graphs[self.next % len(self.graphs)]
            self.next += 1
            if self.ggml.compute(graph, ctypes.byref(plan)) != 0:
                raise RuntimeError("ggml: the product failed")
        return time.perf_counter() - start

    def result(self) -> bytes:
        """y of the first copy."""
        y = self.graphs[0][-1]
        return ctypes.string_at(self.ggml.ggml_get_data(y), self.ggml.ggml_nbytes(y))

    def close(self) -> None:
        for context in self.contexts:
            self.ggml.ggml_free(context)


def main() -> None:
    ggml, products = Ggml(Path(sys.argv[1])), None
    for line in sys.stdin:
        request = json.loads(line)
        if "load" in request:
            if products is not None:
                products.close()
            products = Products(ggml, request)
            products.run(1)
            Path(request["result"]).write_bytes(products.result())
            answer = {}
        else:
            answer = {"seconds": products.run(request["run"])}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
