"""Random calls of layers of the extension, and of the Python doors right above them."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from kt_sft.autograd.linear import packed_linear
from kt_sft.native import native
from tests.helpers.layers import MoeCall, moe
from tests.helpers.native_call_args import Random, Written, plain, write
from tests.helpers.native_calls import Calls

FORMATS = ("bf16", "int8", "int4", "rawint4", "f16", "q4_0", "q5_1", "q8_0", "q4_k", "q6_k", "iq4_xs", "mxfp4")
NAMES = ("", "f16", "f64", "BF16", "bf16 ", "bf16\0", "float32", "\0", "x" * 500, "ü", "int3")
_SCALES = (0.5, 2.0, 0.0, -1.0, 1e38, float("nan"), float("inf"), 10**400, None, "1")


class LayerScene:
    """Layers that live for a while, in whatever state the calls before left them."""

    def __init__(self, calls: Calls):
        self.calls = calls
        self.random: Random = calls.random
        self.linears: list[object] = []
        self.stores: list[object] = []
        self.layers: list[object] = []
        self.tapes: list[tuple[Tensor, ...]] = []

    def name(self, *right: object) -> object:
        if self.random.is_calm or self.random.chance(0.92):
            return self.random.choice(right)
        return self.random.choice((*NAMES, None, 7, b"bf16"))

    # --- PackedLinear ---

    def make_linear(self) -> None:
        n, k = (self.random.number(1, 5, 16, 32, 33, 64, 256) for _ in range(2))
        weight_format, group = self.name(*FORMATS), self.random.number(32, 64, 128)
        made: list[object] = []
        self.calls.attempt(
            "PackedLinear", lambda _: made.append(native().PackedLinear(n, k, weight_format, group)), {}, compare=False
        )
        self.linears = [*self.linears[-3:], *made]

    def load_linear(self) -> None:
        if not self.linears:
            return
        layer = self.random.choice(self.linears)
        blocks = layer.format in FORMATS[4:]
        if self.random.chance(0.1):
            blocks = not blocks
        if not blocks:
            w = self.random.floats(layer.n, layer.k)
            self.calls.attempt("PackedLinear.load", lambda a: layer.load(a["w"]), {"w": w})
        else:
            w = self._rows(layer.format, layer.n, layer.k)
            self.calls.attempt("PackedLinear.load_blocks", lambda a: layer.load_blocks(a["w"]), {"w": w})

    def _rows(self, name: str, n: int, k: int) -> Tensor:
        """Rows of blocks with finite scales."""
        block = next((one for one in native().block_types() if one["name"] == name), {"block": 1, "block_bytes": 2})
        rows = torch.randint(0, 56, (n, k // block["block"] * block["block_bytes"]), dtype=torch.uint8)
        return rows

    def run_linear(self) -> None:
        if not self.linears:
            return
        layer, rng = self.random.choice(self.linears), self.random
        m = rng.choice((0, 1, 2, 5, 33))
        name = self.name("bf16", "f32")
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        kind = rng.choice(("unpack", "forward", "input_grad"))
        if kind == "unpack":
            out = write(rng, (layer.n, layer.k), dtype)
            self.calls.attempt("PackedLinear.unpack", lambda a: layer.unpack(a["out"], name), {}, {"out": out})
        elif kind == "forward":
            out = write(rng, (m, layer.n), dtype)
            rows, kernel = self.name("bf16", "int8", "bfp16"), self._kernel()
            reads = {"a": rng.floats(m, layer.k), "bias": rng.choice((None, torch.randn(layer.n)))}
            self.calls.attempt(
                "PackedLinear.forward",
                lambda a: layer.forward(a["a"], a["out"], name, rows, a["bias"], kernel),
                reads,
                {"out": out},
            )
        else:
            out, kernel = write(rng, (m, layer.k), dtype), self._kernel()
            self.calls.attempt(
                "PackedLinear.input_grad",
                lambda a: layer.input_grad(a["dy"], a["out"], name, kernel),
                {"dy": rng.floats(m, layer.n)},
                {"out": out},
            )

    def _kernel(self) -> object:
        if self.random.chance(0.7):
            return ""
        return self.name(*(row["name"] for row in native().kernel_rows()))

    # --- ExpertStore and MoeLayer ---

    def make_moe(self) -> None:
        rng = self.random
        sizes = [rng.number(1, 3, 8), rng.number(1, 32, 40, 256), rng.number(1, 32, 37, 256)]
        weight_format = self.name(*FORMATS, ("q4_k", "q4_k", "q6_k"), ("bf16", "int8", "f16"), ("bf16",))
        activation = self.name("silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu")
        numbers = (1.702, 7.0)
        if not rng.is_calm and rng.chance(0.5):
            numbers = (rng.choice((0.0, *_SCALES)), rng.choice((1e-3, *_SCALES)))
        group = rng.number(32, 64, 128)
        made: list[object] = []
        if rng.chance(0.2):
            self.calls.attempt(
                "packed_bytes_for",
                lambda _: native().ExpertStore.packed_bytes_for(*sizes, weight_format, group),
                {},
                compare=False,
            )
        self.calls.attempt(
            "ExpertStore",
            lambda _: made.append(native().ExpertStore(*sizes, weight_format, group)),
            {},
            compare=False,
        )
        made = [one for one in made if one.num_experts <= 8]
        for store in made:
            if rng.chance(0.8):
                for expert in range(store.num_experts):
                    self._load(store, expert, lambda t: t)
        self.stores = [*self.stores[-4:], *made]
        self._make_layers(made, activation, numbers)

    def _make_layers(self, made: list[object], activation: object, numbers: tuple) -> None:
        """One over each new store and at times over an older one; what is no store is refused."""
        rng, module = self.random, native()
        for store in [*made, *([rng.choice(self.stores)] if self.stores and rng.chance(0.3) else [])]:
            given = store
            if not rng.is_calm and rng.chance(0.1):
                given = rng.choice((None, 3, "store", module.ExpertStore.__new__(module.ExpertStore), *self.layers[:1]))
            layers: list[object] = []
            self.calls.attempt(
                "MoeLayer",
                lambda _, over=given, kept=layers: kept.append(module.MoeLayer(over, activation, *numbers)),
                {},
                compare=False,
            )
            self.layers = [*self.layers[-4:], *layers]

    def _matrices(self, store: object) -> list[Tensor]:
        shapes = ((store.inter, store.hidden), (store.inter, store.hidden), (store.hidden, store.inter))
        kinds = zip(store.formats, shapes)
        return [
            self._rows(name, n, k) if name in FORMATS[4:] else torch.randn(n, k).to(torch.bfloat16)
            for name, (n, k) in kinds
        ]

    def _load(self, store: object, expert: int, change) -> None:
        if store.format == "rawint4" and store.hidden % 2 == 0 and store.inter % 2 == 0:
            with contextlib.suppress(ValueError):
                store.load_expert_int4(expert, *self._stored(store))
        elif store.format != "rawint4":
            store.load_expert(expert, *map(change, self._matrices(store)))

    def _stored(self, store: object) -> list[tuple[Tensor, Tensor]]:
        shapes = ((store.inter, store.hidden), (store.inter, store.hidden), (store.hidden, store.inter))
        group = store.group_size
        return [(self.random.bytes_of(n, k // 2), torch.rand(n, -(-k // group)).to(torch.bfloat16)) for n, k in shapes]

    def load_moe(self) -> None:
        if not self.stores:
            return
        store = self.random.choice(self.stores)
        expert = self.random.number(*range(store.num_experts))
        if store.format == "rawint4" and self.random.chance(0.9):
            parts = [part for pair in self._stored(store) for part in pair]
            reads = dict(zip(("gq", "gs", "uq", "us", "dq", "ds"), parts))
            self.calls.attempt(
                "load_expert_int4",
                lambda a: store.load_expert_int4(expert, (a["gq"], a["gs"]), (a["uq"], a["us"]), (a["dq"], a["ds"])),
                reads,
            )
        else:
            reads = dict(zip(("gate", "up", "down"), self._matrices(store)))
            self.calls.attempt("load_expert", lambda a: store.load_expert(expert, a["gate"], a["up"], a["down"]), reads)

    def blobs(self) -> None:
        """Packed experts from store to store, in memory that goes or is used twice."""
        if not self.stores:
            return
        rng, store = self.random, self.random.choice(self.stores)
        expert = rng.number(*range(store.num_experts))
        buffers = [self._blob(count) for count in store.blob_bytes]
        kind = rng.choice(("export_expert", "copy_expert", "map_expert"))
        method = getattr(store, kind)
        if rng.chance(0.1):
            buffers[rng.randrange(3)] = rng.choice((b"", None, 5, buffers[0], memoryview(b"x" * 64), bytearray(7)))
        accepted = self.calls.attempt(kind, lambda _: method(expert, *buffers), {}, compare=False)
        if accepted and kind == "map_expert":
            if rng.chance(0.5):
                self.calls.attempt("export_expert", lambda _: store.export_expert(expert, *buffers), {}, compare=False)
            for buffer in buffers:  # what is mapped cannot be shortened
                self.calls.attempt("release", lambda _, held=buffer: held.release(), {}, compare=False)

    def _blob(self, count: int) -> memoryview:
        memory = bytearray(count + 64)
        start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 64
        start += self.random.chance(0.05)
        return memoryview(memory)[start : start + count]

    def unpack(self) -> None:
        if not self.stores:
            return
        rng, store = self.random, self.random.choice(self.stores)
        expert, name = rng.number(*range(store.num_experts)), self.name("bf16", "f32")
        dtype = torch.bfloat16 if name == "bf16" or rng.chance(0.1) else torch.float32
        into, out = (store.inter, store.hidden), (store.hidden, store.inter)
        writes = {key: write(rng, shape, dtype, True) for key, shape in (("gate", into), ("up", into), ("down", out))}
        self.calls.attempt(
            "unpack_expert",
            lambda a: store.unpack_expert(expert, a["gate"], a["up"], a["down"], dtype=name),
            {},
            writes,
        )

    def _inputs(self, layer: object) -> tuple[dict[str, object], dict[str, object], int]:
        """Tensors that forward and backward read, other arguments of both, and the rank."""
        rng = self.random
        tokens, k, rank = (
            rng.choice((0, 1, 3, 9)),
            rng.choice((0, 1, 2, 4)),
            rng.choice((1, 4, 8, 0, 4, 257 - 249 * rng.is_calm)),
        )
        experts = layer.num_experts
        ids = torch.randint(0, experts + 2, (tokens, k))
        if ids.numel() and rng.chance(0.05):
            ids.view(-1)[0] = rng.choice((-1, -(2**63), 2**63 - 1, 2**31, 2**32))
        reads: dict[str, object] = {
            "x": rng.floats(tokens, layer.hidden), "ids": ids, "weights": rng.floats(tokens, k, dtype=torch.float32),
        }  # fmt: skip
        for name, into, out in (("gate", layer.hidden, layer.inter), ("up", layer.hidden, layer.inter),
                                ("down", layer.inter, layer.hidden)):  # fmt: skip
            if rng.chance(0.6):
                reads[f"{name}_a"] = torch.randn(experts, rank, into)
                reads[f"{name}_b"] = torch.randn(experts, rank, out)
        if {"gate_a", "up_a"} <= set(reads) and rng.chance(0.3):
            reads["up_a"] = reads["gate_a"]
        if rng.chance(0.2):
            widths = {"gate": layer.inter, "up": layer.inter, "down": layer.hidden}
            reads.update({f"{name}_bias": torch.randn(experts, width) for name, width in widths.items()})
        rest = {
            "dropout_p": rng.choice((0.0, 0.0, 0.25, 1.0, -1.0, float("nan"), "x")),
            "dropout_seed": rng.number(7, 2**64 - 1),
            "chunk_size": rng.number(1, 2, 1024, 2**62),
            "rows": self.name("bf16", "bf16", "bf16", "int8", "bfp16"),
        }
        self._scale = 0.5 if rng.is_calm else rng.choice((0.5, *_SCALES))
        if rng.is_calm:
            rest["dropout_p"] = rng.choice((0.0, 0.25))
        return reads, rest, rank

    def _lora(self, a: dict) -> tuple:
        return tuple(
            (a[f"{name}_a"], a.get(f"{name}_b"), self._scale) if f"{name}_a" in a else None
            for name in ("gate", "up", "down")
        )

    @staticmethod
    def _bias(a: dict) -> tuple | None:
        return (a["gate_bias"], a["up_bias"], a["down_bias"]) if "gate_bias" in a else None

    def forward(self) -> None:
        if not self.layers:
            return
        rng, layer = self.random, self.random.choice(self.layers)
        reads, rest, rank = self._inputs(layer)
        name = self.name("bf16", "f32")
        tokens, rows = reads["x"].shape[0], reads["ids"].numel()
        dtype = torch.bfloat16 if name == "bf16" or rng.chance(0.1) else torch.float32
        writes = {"out": write(rng, (tokens, layer.hidden), dtype)}
        if rng.chance(0.5):
            writes |= {key: write(rng, (rows, layer.inter_stride), torch.float16) for key in ("g", "u")}
            if "gate_a" in reads and rng.chance(0.5):
                writes["xa"] = write(rng, (rows, rank), torch.float32)

        def call(a: dict) -> None:
            layer.forward(
                a["x"], a["ids"], a["weights"], lora=self._lora(a), g=a.get("g"), u=a.get("u"), out=a["out"],
                out_dtype=name, xa=(a["xa"], None) if "xa" in a else None, bias=self._bias(a), **rest,
            )  # fmt: skip

        # Rows of g and u that no expert has are left as they were: compared through out alone.
        accepted = self.calls.attempt("forward", call, reads, writes, compare=set(writes) == {"out"})
        if accepted and rng.chance(0.05):
            values = {key: plain(value) for key, value in reads.items()}
            self.calls.at_once("forward, threads", lambda: self._once(layer, values, rest))
            if native().num_threads() == 1:
                self.calls.in_a_child("forward, child", lambda: self._once(layer, values, rest))

    def _once(self, layer: object, values: dict, rest: dict) -> Tensor:
        out = torch.zeros(values["x"].shape[0], layer.hidden)
        layer.forward(
            values["x"], values["ids"], values["weights"], lora=(None,) * 3, g=None, u=None, out=out, out_dtype="f32",
            **rest,
        )  # fmt: skip
        return out

    def backward(self) -> None:
        """Of forwards that there were, that there were not, and of others."""
        if not self.layers:
            return
        rng, layer = self.random, self.random.choice(self.layers)
        reads, rest, rank = self._inputs(layer)
        tokens, rows = reads["x"].shape[0], reads["ids"].numel()
        name = self.name("bf16", "f32")
        reads["dout"] = rng.floats(tokens, layer.hidden)
        if rng.chance(0.4):
            reads |= {key: torch.randn(rows, layer.inter_stride).to(torch.float16) for key in ("g", "u")}
            if "gate_a" in reads and rng.chance(0.4):
                reads["xa"] = torch.randn(rows, rank)
        writes = {}
        if rng.chance(0.8):
            writes["dx"] = write(rng, (tokens, layer.hidden), torch.bfloat16 if name == "bf16" else torch.float32)
        if rng.chance(0.6):
            writes["dweights"] = write(rng, tuple(reads["weights"].shape), torch.float32)
        for key in ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b"):
            if key in reads and rng.chance(0.8):
                writes[f"d{key}"] = self._gradient(tuple(reads[key].shape))

        def call(a: dict) -> None:
            grads = tuple((a.get(f"d{one}_a"), a.get(f"d{one}_b")) for one in ("gate", "up", "down"))
            layer.backward(
                a["dout"], a["x"], a["ids"], a["weights"], lora=self._lora(a), g=a.get("g"), u=a.get("u"),
                dx=a.get("dx"), dx_dtype=name, dtopk_weights=a.get("dweights"), lora_grads=grads,
                xa=(a["xa"], None) if "xa" in a else None, bias=self._bias(a), **rest,
            )  # fmt: skip

        shares = reads.get("up_a") is not None and reads.get("up_a") is reads.get("gate_a")
        self.calls.attempt("backward", call, reads, writes, compare=not shares)

    def _gradient(self, shape: tuple[int, int, int]) -> Written:
        one = write(self.random, shape, torch.float32)
        if one.canvas is not None and one.tensor.is_contiguous() and self.random.chance(0.4):
            experts, rank, _ = shape
            one.tensor.as_strided_(shape, (1, experts, experts * rank))
        return one

    def differentiate(self) -> None:
        """Through autograd, backward once more than there is a tape for."""
        rng = self.random
        if not self.layers or not self.linears:
            return
        layer, linear, times = rng.choice(self.layers), rng.choice(self.linears), rng.choice((1, 1, 2))

        def through_moe(a: dict) -> None:
            call = MoeCall(layer, retain=rng.chance(0.5), chunk_size=4)
            out = moe(a["x"], a["ids"], a["weights"], (None,) * 6, call)
            for _ in range(times if out.requires_grad else 0):
                out.float().sum().backward()

        def through_linear(a: dict) -> None:
            out = packed_linear(a["x"], linear)
            if out.requires_grad:
                out.float().sum().backward()

        x = torch.randn(3, layer.hidden).to(rng.choice((torch.float32, torch.bfloat16, torch.float16))).requires_grad_()
        reads = {"x": x, "ids": torch.randint(0, layer.num_experts, (3, 2)), "weights": torch.rand(3, 2)}
        self.calls.attempt("moe", through_moe, reads, compare=False, may_be_torch=True)
        reads = {"x": torch.randn(2, 3, linear.k).requires_grad_(rng.chance(0.5))}
        self.calls.attempt("packed_linear", through_linear, reads, compare=False, may_be_torch=True)
