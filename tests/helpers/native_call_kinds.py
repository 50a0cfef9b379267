"""What random calls call: every function and method of the extension."""

from __future__ import annotations

import copy
import gc
import pickle

import torch

from kt_sft.native import native
from tests.helpers.native_call_args import HUGE, SMALL, read, write
from tests.helpers.native_call_layers import FORMATS, NAMES, LayerScene

_GGUF = {"Q4_0": (18, 32), "Q8_0": (34, 32), "Q4_K": (144, 256), "IQ1_M": (56, 256), "F32": (4, 1), "NVFP4": (36, 64)}


class Scene(LayerScene):
    """Chooses calls; threads and instruction sets are as before when it is left."""

    def __enter__(self) -> Scene:
        self._before = native().num_threads(), native().num_pools(), native().isa_active()
        return self

    def __exit__(self, *_: object) -> None:
        native().set_threads(*self._before[:2], fake_nodes=True)
        native().set_isa(self._before[2])

    def step(self) -> None:
        """One call, or two."""
        steps = (
            (self.make_linear, 3), (self.load_linear, 4), (self.run_linear, 9), (self.make_moe, 3), (self.load_moe, 6),
            (self.blobs, 5), (self.unpack, 4), (self.forward, 12), (self.backward, 12), (self.differentiate, 4),
            (self.dequantize, 8), (self.factors, 4), (self.process, 4), (self.objects, 2), (self.drop, 1),
        )  # fmt: skip
        step = self.random.choices([step for step, _ in steps], [weight for _, weight in steps])[0]
        self.random.is_calm = self.random.chance(0.4)
        step()

    def dequantize(self) -> None:
        rng = self.random
        rows, name = rng.choice((0, 1, 3, 40)), rng.choice(("gguf", "fp8", "int4", "mxfp4"))
        dtype = rng.choice((torch.bfloat16, torch.float32))
        if name == "gguf":
            kind = rng.choice(list(_GGUF))
            block_bytes, elements = _GGUF[kind]
            blocks = rng.choice((0, 1, 3))
            asked = kind if rng.chance(0.9) else rng.choice((*NAMES, "Q8_K", "F64", "I8"))
            self.calls.attempt(
                "dequantize_gguf",
                lambda a: native().dequantize_gguf(asked, a["blocks"], a["out"]),
                {"blocks": rng.bytes_of(rows, blocks * block_bytes)},
                {"out": write(rng, (rows, blocks * elements), dtype, True)},
            )
            return
        cols = rng.choice((0, 32, 64, 96))
        out = {"out": write(rng, (rows, cols), dtype, True)}
        size, other = rng.number(1, 16, 32, 128), rng.number(1, 8, 32)
        right = [max(1, min(one, 2**40)) for one in (size, other)]
        if name == "fp8":
            scales = torch.rand(-(-rows // right[1]), -(-cols // right[0]))
            reads = {"w": rng.bytes_of(rows, cols), "scales": scales}
            call = lambda a: native().dequantize_fp8(a["w"], a["scales"], other, size, a["out"])  # noqa: E731
        elif name == "int4":
            reads = {"w": rng.bytes_of(rows, cols // 2), "scales": torch.rand(rows, -(-cols // right[0]))}
            call = lambda a: native().dequantize_int4(a["w"], a["scales"], size, a["out"])  # noqa: E731
        else:
            reads = {"w": rng.bytes_of(rows, cols // 2), "scales": rng.bytes_of(rows, cols // 32)}
            call = lambda a: native().dequantize_mxfp4(a["w"], a["scales"], a["out"])  # noqa: E731
        self.calls.attempt(f"dequantize_{name}", call, reads, out)

    def factors(self) -> None:
        rng = self.random
        experts, rank, dim = (rng.choice((1, 3, 8, 0)) for _ in range(3))
        if rng.chance(0.5):
            self.calls.attempt(
                "operand_from_expert_minor",
                lambda a: native().operand_from_expert_minor(a["stored"], a["operand"]),
                {"stored": torch.randn(dim, rank * experts)},
                {"operand": write(rng, (experts, rank, dim), torch.float32)},
            )
            return
        values = torch.randn(experts, rank, dim).to(rng.choice((torch.float32, torch.bfloat16, torch.float16)))
        factors = (read(rng, values), None, read(rng, values))
        self.calls.attempt("sample_factors", lambda _: native().sample_factors(factors), {}, compare=False)

    def process(self) -> None:
        """Threads, instruction sets, names."""
        rng, module = self.random, native()
        count = rng.number(1, 2, 3)
        name = self.name(*FORMATS)
        isa = self.name("auto", "scalar", "avx2", module.isa_active())
        tensor = read(rng, torch.empty(rng.choice((0, 8, 3 << 20))))
        pools = rng.choice((1, 1, 2, 0, *SMALL, *HUGE))
        rows, op = self.name("bf16", "bfp16", "int8"), self.name("forward", "input_grad")
        sizes = [rng.choice((1, 5, 512, *SMALL, *HUGE)) for _ in range(3)]
        calls = {
            "set_threads": lambda _: module.set_threads(count, pools, fake_nodes=True),
            "set_isa": lambda _: module.set_isa(isa),
            "default_rows": lambda _: module.default_rows(name),
            "judge_kernels": lambda _: module.judge_kernels(name, rows, op, *sizes),
            "can_dequantize_gguf": lambda _: module.can_dequantize_gguf(name),
            "advise_huge_pages": lambda _: module.advise_huge_pages(tensor),
            "facts": lambda _: (module.kernel_rows(), module.block_types(), module.cpu_info(), module.num_pools()),
        }
        kind = rng.choice(list(calls))
        self.calls.attempt(kind, calls[kind], {}, compare=False)

    def objects(self) -> None:
        """Layers that Python made past __init__, copies of them, and properties of both."""
        rng, module = self.random, native()
        kind = rng.choice((module.ExpertStore, module.MoeLayer, module.PackedLinear))
        blank = kind.__new__(kind)
        name = rng.choice([name for name in dir(kind) if not name.startswith("_") and name != "packed_bytes_for"])

        def use(_: dict) -> None:
            found = getattr(blank, name)
            found(*(torch.zeros(1) for _ in range(4)))

        self.calls.attempt("before __init__", use, {}, compare=False)
        if self.layers and self.stores:
            one = rng.choice((*self.layers, *self.stores))
            way = rng.choice((copy.copy, copy.deepcopy, pickle.dumps))
            self.calls.attempt("copy", lambda _: way(one), {}, compare=False)

    def drop(self) -> None:
        """Layers whose sources are gone go, too; stores go before layers over them, or after."""
        self.layers, self.linears = self.layers[1:], self.linears[1:]
        self.stores = self.stores[self.random.choice((0, 2)) :]
        gc.collect()
