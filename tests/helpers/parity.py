"""A model with our experts beside the same model in plain transformers and PEFT, and how far rounding may part them.

The truth is the plain model in float64. The kernels round to bf16 at fixed points (docs/numerics.md), so the error of a
logit or gradient is what these roundings become on their way through the network. That is measured: `NoisyExperts` is
the same arithmetic in float64 with a random relative perturbation of at most 2^-8, bf16's unit roundoff, at each of
these points (Monte-Carlo arithmetic). The spread of a few such runs around the truth, times a slack, is the bound.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from kt_sft.integrations import peft as kt_peft
from kt_sft.models.families import adapt_block
from kt_sft.models.spec import ExpertsSpec, find_experts, is_experts_module, iter_routed_experts
from kt_sft.nn.routed_experts import RoutedExperts
from tests.helpers import dropout, tiny_models
from tests.helpers.reference import GATES, clamped_swiglu

BF16_ROUNDOFF = 2.0**-8
SLACK = 3.0  # the largest of NUM_RUNS spreads is itself random, and true rounding errors are not
NUM_RUNS = 4
F32_FLOOR = 2.0**-17  # attention, norms and router run in f32 on our side: some tens of roundings of 2^-24
ISAS = ("scalar", "avx2", "avx512")

torch.set_num_threads(1)  # matrices this small only make a second thread spin


def load_ours(directory: Path, dtype: torch.dtype = torch.float32, **config) -> nn.Module:
    """Our model in `dtype`, experts packed in bf16."""
    import kt_sft

    return kt_sft.load_model(directory, kt_sft.KTConfig(threads=1, **config), dtype=dtype).eval()


@contextmanager
def isa(name: str) -> Iterator[None]:
    """Run the kernels of one instruction set, or skip the test and say why."""
    from kt_sft.native import native

    detected, active = native().isa_detected(), native().isa_active()
    if name not in detected:
        pytest.skip(f"this CPU lacks {name} (it has {', '.join(detected)})")
    native().set_isa(name)
    try:
        yield
    finally:
        native().set_isa(active)


def all_linear(**overrides) -> LoraConfig:
    """LoRA of rank 3 on every layer, experts included, with a scale that makes it matter."""
    values = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**values, **overrides})


def fill_lora(peft_model: nn.Module, seed: int = 0) -> nn.Module:
    """Random LoRA factors, exact in bf16, that depend on the parameter's name only; both factors non-zero."""
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if ".lora_" in name:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_((0.6 * values / parameter.shape[1] ** 0.5).to(torch.bfloat16))
    return peft_model


def plain_peft(directory: Path, adapter_dir: Path, *, dtype: torch.dtype = torch.float64) -> PeftModel:
    """Stock transformers and stock PEFT with a saved adapter, trainable, in eval mode."""
    model = tiny_models.load_stock(directory, dtype=dtype)
    return PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=True).eval()


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The routed experts, stock or ours, by path in the plain model: below the wrappers that PEFT puts around them."""
    ours = {id(module) for _, module in iter_routed_experts(model)}
    found = {
        name: module
        for name, module in model.named_modules()
        if id(module) in ours or (is_experts_module(module) and not isinstance(module, LoraLayer))
    }
    return {re.sub(r"^base_model\.model\.|\.base_layer", "", name): module for name, module in found.items()}


def router_weights(peft_model: nn.Module) -> list[str]:
    """Weights beside the experts with one row per expert."""
    experts = experts_modules(peft_model)
    counts = {name.rpartition(".")[0]: module.num_experts for name, module in experts.items()}
    names = []
    for name, parameter in peft_model.named_parameters():
        plain = name.removeprefix("base_model.model.")
        if "lora_" in name or "experts" in plain.split(".") or parameter.dim() != 2:
            continue
        if any(plain.startswith(f"{block}.") and len(parameter) == count for block, count in counts.items()):
            names.append(name)
    return names


def unfreeze_inputs_and_routers(peft_model: nn.Module) -> None:
    """Let gradients show at the embedding (dx of everything) and at the routers' weights."""
    routers = set(router_weights(peft_model))
    for name, parameter in peft_model.named_parameters():
        if name in routers or name.endswith(("embed_tokens.weight", "embeddings.weight")):
            parameter.requires_grad_(True)


def logits_and_grads(peft_model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """`logits` and the gradient of a next-token loss by parameter name, all float64; leaves `.grad` empty."""
    peft_model.zero_grad(set_to_none=True)
    out = peft_model(input_ids=ids, attention_mask=mask, labels=ids)
    out.loss.backward()
    result = {"logits": out.logits.detach().double()}
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:  # `check_close` compares which ones there are
            result[name] = parameter.grad.detach().double()
    peft_model.zero_grad(set_to_none=True)
    return result


class Rounding(nn.Module):
    """Perturbs by a random relative amount where the kernels round; `roundoff` 0 is exact arithmetic."""

    def __init__(self, roundoff: float, seed: int):
        super().__init__()
        self.roundoff = roundoff
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, z: Tensor, *, value: bool = True, grad: bool = True) -> Tensor:
        """Perturb the value on the way forward, the gradient on the way back."""
        return _Perturb.apply(z, self._factor(z, value), self._factor(z, grad))

    def _factor(self, z: Tensor, wanted: bool) -> Tensor | None:
        if not wanted or self.roundoff == 0.0:
            return None
        noise = torch.rand(z.shape, generator=self.generator, dtype=torch.float64)
        return 1.0 + self.roundoff * (2.0 * noise - 1.0)


class _Perturb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, value: Tensor | None, grad: Tensor | None) -> Tensor:
        ctx.grad = grad
        return z.clone() if value is None else z * value

    @staticmethod
    def backward(ctx, dz: Tensor):
        return (dz if ctx.grad is None else dz * ctx.grad), None, None


Masks = dict[str, Tensor]  # of one layer: "hidden" and "inter" -> kept elements times 1 / (1 - p), [tokens, k, width]


class NoisyExperts(nn.Module):
    """Stands where `RoutedExperts` stands, in float64 torch; takes part in `kt_peft.get_peft_model` like it."""

    def __init__(self, spec: ExpertsSpec, stock: nn.Module, rounding: Rounding):
        super().__init__()
        self.spec, self.rounding, self.lora = spec, rounding, None
        self.num_experts = spec.num_experts
        self.masks: Masks | None = None
        if spec.expert_keys:
            gate, up, down = (torch.stack([getattr(e, key).weight.detach() for e in stock]) for key in spec.expert_keys)
            weights = (torch.cat([gate, up], dim=1).double(), down.double())
        else:
            weights = (stock.gate_up_proj.detach().double(), stock.down_proj.detach().double())
        gate_up, down = (w.mT if spec.is_transposed else w for w in weights)  # [experts, out, in]
        self.weights = [torch.cat([gate_up[:, spec.gate_rows], gate_up[:, spec.up_rows]], dim=1), down]
        self.biases = [torch.zeros(spec.num_experts, 1, dtype=torch.float64)] * 2
        if spec.has_bias:
            bias = stock.gate_up_proj_bias.detach()
            bias = torch.cat([bias[:, spec.gate_rows], bias[:, spec.up_rows]], dim=1)
            self.biases = [bias, stock.down_proj_bias.detach()]
        for name, shape in (("gate_up_proj", spec.gate_up_shape), ("down_proj", spec.down_shape)):
            placeholder = torch.zeros(1, dtype=torch.float64).expand(shape)
            self.register_parameter(name, nn.Parameter(placeholder, requires_grad=False))

    packed_bytes = 0
    hide_placeholders, show_placeholders = RoutedExperts.hide_placeholders, RoutedExperts.show_placeholders

    def load_expert(self, *args) -> None:
        raise NotImplementedError

    def unpack_expert(self, index: int) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        r = self.rounding
        tokens, k = top_k_index.shape
        x = r(hidden_states, grad=False)  # [tokens, hidden]
        y = x.new_zeros(tokens, k, self.spec.hidden)
        for expert in range(self.spec.num_experts):
            t, slot = (top_k_index == expert).nonzero(as_tuple=True)  # [rows]
            if len(t) == 0:
                continue
            gate_up = r(self._product(0, expert, x[t], "hidden", t, slot))  # [rows, 2 * inter]
            gate, up = gate_up.chunk(2, dim=-1)
            h = r(self._gate(gate, up), grad=False)  # [rows, inter]
            down = self._product(1, expert, h, "inter", t, slot)  # [rows, hidden]
            y = y.index_put((t, slot), r(down, value=False))
        out = torch.einsum("tkh,tk->th", y, top_k_weights.to(y.dtype))
        return r(out, value=False)

    def _gate(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.spec.activation == "clamped_swiglu":
            return clamped_swiglu(gate, up, self.spec.alpha, self.spec.limit)
        return GATES[self.spec.activation](gate, up)

    def _product(self, which: int, expert: int, x: Tensor, kind: str, t: Tensor, slot: Tensor) -> Tensor:
        """x W_e^T + scaling (mask x A_e^T) B_e of gate_up or down."""
        out = x @ self.weights[which][expert].T + self.biases[which][expert]
        lora = self.lora
        pair = (lora.gate_up, lora.down)[which] if lora is not None and lora.active() else None
        if pair is None:
            return out
        if self.masks is not None:
            x = x * self.masks[kind][t, slot]
        a, b = pair.a.canonical()[expert].double(), pair.b.canonical()[expert].double()
        return out + pair.scaling() * self.rounding(x @ a.T) @ b


def noisy_peft(
    directory: Path,
    adapter_dir: Path,
    *,
    roundoff: float = BF16_ROUNDOFF,
    seed: int = 0,
    masks: list[Masks] | None = None,
) -> PeftModel:
    """The plain model in float64 with `NoisyExperts` and a saved adapter."""
    model = tiny_models.load_stock(directory, dtype=torch.float64)
    for number, (name, spec) in enumerate(find_experts(model).items()):
        experts = NoisyExperts(spec, model.get_submodule(name), Rounding(roundoff, 1000 * seed + number))
        experts.masks = masks[number] if masks is not None else None
        parent, _, attribute = name.rpartition(".")
        block = model.get_submodule(parent)
        adapt_block(block, getattr(block, attribute))
        setattr(block, attribute, experts)
    return kt_peft.load_adapter(model, adapter_dir, is_trainable=True).eval()


@torch.no_grad()
def routing(peft_model: nn.Module, ids: Tensor) -> list[Tensor]:
    """The experts that each layer chooses for each token, sorted, `[tokens, k]` per layer."""
    chosen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: chosen.append(_chosen(module, args, ids.numel())))
        for module in experts_modules(peft_model).values()
    ]
    peft_model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return chosen


def _chosen(experts: nn.Module, args: tuple, tokens: int) -> Tensor:
    """Experts of each token, `[tokens, k]`, sorted."""
    if len(args) > 1:
        return args[1].reshape(tokens, -1).sort(dim=-1).values
    rows = args[0].view(experts.num_experts, tokens, -1)  # Llama 4: zeros where not chosen
    return rows.any(dim=-1).T.nonzero()[:, 1].view(tokens, -1)


def decided_ids(directory: Path, adapter_dir: Path, *, batch: int = 2, length: int = 9) -> Tensor:
    """Token ids whose routing survives rounding: at a near tie of two experts two different networks were compared."""
    plain = plain_peft(directory, adapter_dir)
    noisy = [noisy_peft(directory, adapter_dir, roundoff=2 * BF16_ROUNDOFF, seed=seed) for seed in range(NUM_RUNS)]
    for seed in range(200):
        ids = tiny_models.token_ids(batch, length, seed=seed)
        truth = routing(plain, ids)
        if all(same_routing(truth, routing(model, ids)) for model in noisy):
            return ids
    raise AssertionError("no batch with decided routing; use fewer tokens")


def same_routing(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def dropout_masks(seed: int, p: float, *, tokens: int, k: int, spec: ExpertsSpec) -> Masks:
    """The masks that the kernels apply in one layer's call with this seed."""
    widths = {"hidden": (dropout.HIDDEN, spec.hidden), "inter": (dropout.INTER, spec.inter)}
    return {
        kind: torch.from_numpy(dropout.dropout_mask(seed, stream, tokens * k, width, p)).view(tokens, k, width)
        / (1.0 - p)
        for kind, (stream, width) in widths.items()
    }


def norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def bounds(directory: Path, adapter_dir: Path, truth: dict[str, Tensor], run, **noisy) -> dict[str, float]:
    """Largest norm-wise error that rounding can explain, for each entry of `truth`; `run(model)` makes such entries."""
    spread = dict.fromkeys(truth, 0.0)
    for seed in range(NUM_RUNS):
        perturbed = run(noisy_peft(directory, adapter_dir, seed=seed + 1, **noisy))
        spread = {name: max(spread[name], norm(perturbed[name] - truth[name])) for name in truth}
    floor = max(norm(value) / value.numel() ** 0.5 for value in truth.values()) * 1e-12
    return {name: SLACK * spread[name] + F32_FLOOR * norm(truth[name]) + floor for name in truth}


def check_close(found: dict[str, Tensor], truth: dict[str, Tensor], bound: dict[str, float]) -> None:
    """Every entry within its bound, and every bound small enough to notice a missing term."""
    assert set(found) == set(truth), set(found) ^ set(truth)
    for name, value in truth.items():
        if not value.any():  # a router whose gradient vanishes in eval mode
            continue
        assert bound[name] < 0.25 * norm(value), f"{name}: bound {bound[name]:.2e} says nothing at {norm(value):.2e}"
    report = {name: (norm(found[name] - truth[name]), bound[name]) for name in truth}
    broken = {name: f"error {e:.2e} > bound {b:.2e}" for name, (e, b) in report.items() if not e <= b}
    assert not broken, broken
