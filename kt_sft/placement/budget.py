"""Memory of each device under a plan, from shapes alone. docs/rules.md has the formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import nn

from kt_sft.formats.packed_manifest import packed_bytes
from kt_sft.models.layout import ExpertsSpec
from kt_sft.placement.plan import EXPERTS, LINEAR, Plan

# A trained factor is f32, with its gradient and two moments of Adam.
TRAINED_BYTES = 16


@dataclass(frozen=True)
class Run:
    """What a run does with the model, as far as memory is concerned.

    Args:
        tokens: of one pass (batch x length).
        element_bytes: of weights and activations outside the experts.
        trains: keeps gradients and optimizer state; otherwise LoRA is weights only, and activations die at once.
        checkpoints: keeps only the input of each layer, and computes the rest again in backward.
        retains: keeps the experts' activations until backward (`cpu_activation: retain`).
        experts_per_token: routed experts of a token.
        lora: elements of the LoRA factors of each module.
        rank: of LoRA on experts; 0: none.
        vocabulary: rows of the logits.
    """

    tokens: int
    element_bytes: int = 2
    trains: bool = True
    checkpoints: bool = True
    retains: bool = True
    experts_per_token: int = 1
    lora: Mapping[str, int] | None = None
    rank: int = 0
    vocabulary: int = 0


@dataclass
class DeviceMemory:
    """Bytes on one device, by component."""

    weights_bytes: int = 0
    experts_bytes: int = 0
    staging_bytes: int = 0
    lora_bytes: int = 0
    activations_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All components."""
        return sum(getattr(self, field.name) for field in fields(self))


def memory_by_device(
    model: nn.Module, plan: Plan, specs: Mapping[str, ExpertsSpec], expert_bytes: Mapping[str, int], run: Run
) -> dict[str, DeviceMemory]:
    """Bytes of each device that the plan uses, main memory (`cpu`) first.

    Args:
        model: on the meta device, its experts modules in place.
        expert_bytes: packed size of each experts module.
    """
    memory = {device: DeviceMemory() for device in ("cpu", *sorted(set(plan.devices) - {"cpu"}))}
    _add_weights(memory, model, plan, run)
    memory["cpu"].experts_bytes = sum(expert_bytes.values())
    memory["cpu"].staging_bytes = max(spec.expert_bytes for spec in specs.values())
    for name, elements in (run.lora or {}).items():
        memory[_lora_device(plan, name)].lora_bytes += elements * (TRAINED_BYTES if run.trains else 4)
    _add_activations(memory, model, plan, run)
    layers = [_expert_activations(spec, run) for spec in specs.values()]
    memory["cpu"].activations_bytes += max(layers) if run.checkpoints or not run.trains else sum(layers)
    return memory


def _add_weights(memory: dict[str, DeviceMemory], model: nn.Module, plan: Plan, run: Run) -> None:
    """Parameters and buffers outside the experts; a tied weight once, packed weights with padding and scales."""
    seen: set[int] = set()
    for placement in plan.placements:
        if placement.kind == EXPERTS:
            continue
        module, held = model.get_submodule(placement.name), memory[placement.device]
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if placement.kind == LINEAR and tensor.dim() == 2:
                held.weights_bytes += packed_bytes(placement.method or "bf16", 0, *tensor.shape)
            else:
                held.weights_bytes += tensor.numel() * run.element_bytes


def _add_activations(memory: dict[str, DeviceMemory], model: nn.Module, plan: Plan, run: Run) -> None:
    """Outputs of linear layers and norms: of all layers, or of the largest one and the inputs of the others."""
    by_layer: dict[str, dict[int | None, int]] = {device: {} for device in memory}
    hidden = model.config.get_text_config().hidden_size
    for placement in plan.placements:
        number = plan.layer_of(placement.name)
        if placement.kind == EXPERTS or number is None:
            continue
        module = model.get_submodule(placement.name)
        width = module.out_features if isinstance(module, nn.Linear) else hidden
        layers = by_layer[placement.device]
        layers[number] = layers.get(number, 0) + run.tokens * width * run.element_bytes
    for device, layers in by_layer.items():
        largest, everything = max(layers.values(), default=0), sum(layers.values())
        if not run.trains:
            memory[device].activations_bytes += largest
        elif run.checkpoints:
            inputs = len(layers) * run.tokens * hidden * run.element_bytes
            memory[device].activations_bytes += inputs + 2 * largest  # and the gradients of that layer
        else:
            memory[device].activations_bytes += everything + largest
    # Logits; in training also their f32 copy and its gradient.
    head = next((p.device for p in reversed(plan.placements) if p.kind != EXPERTS), "cpu")
    memory[head].activations_bytes += run.tokens * run.vocabulary * (run.element_bytes + (8 if run.trains else 0))


def _expert_activations(spec: ExpertsSpec, run: Run) -> int:
    """Of one layer's experts on the CPU: hidden states in and out, and in training the tape."""
    rows = run.tokens * run.experts_per_token
    states = 2 * 2 * run.tokens * spec.hidden
    if not run.trains:
        return states
    gates = 2 * 2 * rows * spec.inter if run.retains else 0  # gate and up products in f16
    thin = 3 * 4 * rows * run.rank if run.retains else 0  # x A^T of gate, up and down in f32
    return states + gates + thin


def _lora_device(plan: Plan, name: str) -> str:
    """Where PEFT keeps the factors of a module: beside its weight, or with the whole model if that is on one device."""
    if len(plan.devices) == 1:
        return plan.devices[0]
    return next(placement.device for placement in plan.placements if placement.name == name)
