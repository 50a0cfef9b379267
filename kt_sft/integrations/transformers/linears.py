"""Which linear layers of a loaded model our kernels compute: the frozen ones that live on the CPU."""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from kt_sft.config import KTConfig
from kt_sft.errors import GIB, ConfigError
from kt_sft.integrations.peft.targets import router_linears
from kt_sft.native import native
from kt_sft.nn.packed_linear import pack_linear

logger = logging.getLogger(__name__)

# `auto` leaves smaller weights to torch: they stay in the caches, and a call of ours costs 10 us whatever its size.
MIN_ELEMENTS = 1 << 16
# `auto` asks for this much, so that it does not change sides from one run to the next.
MIN_SPEEDUP = 1.2


def pack_linears(model: nn.Module, config: KTConfig, chosen: Mapping[str, str] | None = None) -> list[str]:
    """Turn linear layers of a model that has its weights into packed ones; returns their names.

    Those of `chosen` get the formats that it names, whatever the settings say; a ConfigError names one that cannot be.

    `auto` packs layers that are at least `MIN_ELEMENTS` large, in bf16, if that is faster here than torch; `bf16` and
    `int8` pack every eligible layer. A model that is in another dtype than bf16 has no eligible layer.
    """
    packed = _pack_chosen(model, config, chosen) if chosen else []
    return packed + _pack_by_setting(model, config)


def _pack_chosen(model: nn.Module, config: KTConfig, chosen: Mapping[str, str]) -> list[str]:
    eligible = dict(eligible_linears(model))
    wrong = [name for name in chosen if name not in eligible]
    if wrong:
        raise ConfigError(
            "optimize_rule: PackedLinear: expected bf16 linear layers on the CPU that share no weight, and no router, "
            f"found {', '.join(wrong[:3])}; load in bf16, or use class default for them"
        )
    for name, weight_format in chosen.items():
        pack_linear(eligible[name], weight_format, activations=_activations(config))
    return list(chosen)


def _pack_by_setting(model: nn.Module, config: KTConfig) -> list[str]:
    is_auto = config.cpu_linear == "auto"
    eligible = {} if config.cpu_linear == "off" else dict(eligible_linears(model))
    if is_auto:
        eligible = {name: linear for name, linear in eligible.items() if linear.weight.numel() >= MIN_ELEMENTS}
    if not eligible:
        return []
    why = f"cpu_linear: {config.cpu_linear}"
    if is_auto:
        gain = speedup()
        why = f"{gain:.1f} times torch's speed in bf16 on this machine"
        if gain < MIN_SPEEDUP:
            logger.info("linear layers on the CPU stay with torch: our kernels have %s", why)
            return []
    weight_format = "bf16" if is_auto else config.cpu_linear
    for name, linear in eligible.items():
        try:
            pack_linear(linear, weight_format, activations=_activations(config))
        except ValueError as error:
            raise ValueError(f"{name}: {error}; set cpu_linear: off or bf16") from None
    packed_bytes = sum(linear.packed_bytes for linear in eligible.values())
    logger.info(
        "packed %d frozen linear layers in %.2f GiB (%s): %s; cpu_linear: off leaves them to torch",
        *(len(eligible), packed_bytes / GIB, weight_format, why),
    )
    return list(eligible)


def _activations(config: KTConfig) -> str:
    """int8 ones are asked for by name for the experts, which may be int8 where these layers are not."""
    return "bf16" if config.expert_activations == "bf16" else "auto"


def plain_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Layers that can be packed in some dtype, on some device, of a model with our experts.

    Left alone: routers (models read their weight directly, in f32), and weights that several modules share (a tied
    head: the embedding needs the rows).
    """
    routers = set(router_linears(model))
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name not in routers and owners[id(module.weight)] == 1:
            yield name, module


def eligible_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Layers that can be packed without changing what the model computes, but for rounding.

    Those of `plain_linears` with a bf16 weight on the CPU, but for modules with hooks, which may move weights between
    devices.
    """
    for name, module in plain_linears(model):
        if module.weight.dtype != torch.bfloat16 or module.weight.device.type != "cpu":
            continue
        if not (module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")):
            yield name, module


def speedup() -> float:
    """How many times torch's speed our bf16 kernels have here, measured once per process and thread setting."""
    library = native()
    return _speedup(library.isa_active(), library.num_threads(), torch.get_num_threads())


@functools.cache
def _speedup(isa: str, threads: int, torch_threads: int) -> float:
    """Geometric mean over one token forward, some tokens forward, and their input gradient; some milliseconds."""
    size, tokens = 512, 16
    generator = torch.Generator().manual_seed(0)
    weight, x = (
        torch.randn(shape, generator=generator, device="cpu").to(torch.bfloat16)
        for shape in ((size, size), (tokens, size))
    )
    layer = native().PackedLinear(size, size)
    layer.load(weight)
    out = torch.empty(tokens, size, dtype=torch.bfloat16, device="cpu")
    gains = [
        _seconds(lambda: nn.functional.linear(x[:1], weight)) / _seconds(lambda: layer.forward(x[:1], out[:1])),
        _seconds(lambda: nn.functional.linear(x, weight)) / _seconds(lambda: layer.forward(x, out)),
        _seconds(lambda: x @ weight) / _seconds(lambda: layer.input_grad(x, out)),
    ]
    return float(torch.tensor(gains, dtype=torch.float64, device="cpu").log().mean().exp())


@torch.no_grad()
def _seconds(run: Callable[[], Tensor | None], repeats: int = 3) -> float:
    """The fastest of a few runs after a first one."""
    times = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times[1:])
