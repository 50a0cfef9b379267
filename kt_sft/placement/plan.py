"""A resolved plan: where each module of one model goes, and what that means for the loader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

EXPERTS, LINEAR, MODULE = "experts", "linear", "module"


@dataclass(frozen=True)
class Placement:
    """One module that holds weights itself.

    Args:
        kind: `experts` (routed, in CPU kernels), `linear` (of class PackedLinear by a rule) or `module`.
        method: format of experts, or of a packed linear layer; None for other modules.
        rule: number of the rule that decided; None: no rule did.
    """

    name: str
    kind: str
    device: str
    method: str | None = None
    rule: int | None = None


@dataclass(frozen=True)
class Plan:
    """Placements of one model, in module order.

    Args:
        layers_name: path of the list of decoder layers.
    """

    placements: tuple[Placement, ...]
    layers_name: str

    @property
    def methods(self) -> dict[str, str]:
        """Format of each experts module."""
        return {p.name: p.method for p in self.placements if p.kind == EXPERTS and p.method is not None}

    @property
    def packed_linears(self) -> dict[str, str]:
        """Format of each linear layer that a rule has packed."""
        return {p.name: p.method for p in self.placements if p.kind == LINEAR and p.method is not None}

    @property
    def devices(self) -> tuple[str, ...]:
        """Of everything but the experts, in the order in which a token meets them."""
        return tuple(dict.fromkeys(p.device for p in self.placements if p.kind != EXPERTS))

    def layer_of(self, name: str) -> int | None:
        """Number of the decoder layer that a module lies in."""
        return layer_number(name, self.layers_name)

    def device_map(self) -> dict[str, str]:
        """Modules to devices as `from_pretrained` takes it: one entry if all share a device, else one for each layer.

        Experts have no entry of their own; they stay in main memory whatever their layer's is.
        """
        devices = {p.name: p.device for p in self.placements if p.kind != EXPERTS}
        return dict(_entries("", devices, self.layers_name))


def layer_number(name: str, layers_name: str) -> int | None:
    """Number of the decoder layer that a module lies in; None: in none."""
    inside = name.removeprefix(f"{layers_name}.")
    number = inside.partition(".")[0]
    return int(number) if inside != name and number.isdigit() else None


def _entries(name: str, devices: Mapping[str, str], layers_name: str) -> list[tuple[str, str]]:
    """Entries of a device map for a module and all below it; `devices` are those of modules there."""
    used = set(devices.values())
    holds_layers = name and (layers_name == name or layers_name.startswith(f"{name}."))
    if len(used) == 1 and not holds_layers:
        return [(name, used.pop())]
    below: dict[str, dict[str, str]] = {}
    start = len(name) + 1 if name else 0
    for module, device in devices.items():
        if module != name:
            child = module[:start] + module[start:].partition(".")[0]
            below.setdefault(child, {})[module] = device
    own = [(name, devices[name])] if name in devices else []
    return own + [entry for child, inner in below.items() for entry in _entries(child, inner, layers_name)]


@dataclass(frozen=True)
class Group:
    """Modules of a plan that are told in one line: `model.layers.0-11.mlp.experts`."""

    modules: str
    what: str
    device: str
    rules: tuple[int, ...]


def groups(plan: Plan) -> list[Group]:
    """The plan in few lines, in module order: layers by range, experts and packed linear layers of their own."""
    found: dict[tuple[str, str, str], tuple[set[int], set[int]]] = {}
    for placement in plan.placements:
        number = plan.layer_of(placement.name)
        what = "weights" if placement.method is None else f"{placement.kind} {placement.method}"
        name = placement.name
        if number is not None:
            inside = name.removeprefix(f"{plan.layers_name}.{number}") if placement.kind != MODULE else ""
            name = f"{plan.layers_name}.*{inside}"
        numbers, rules = found.setdefault((name, what, placement.device), (set(), set()))
        numbers.update(() if number is None else (number,))
        rules.update(() if placement.rule is None else (placement.rule,))
    return [
        Group(name.replace(".*", f".{_ranges(numbers)}", 1) if numbers else name, what, device, tuple(sorted(rules)))
        for (name, what, device), (numbers, rules) in found.items()
    ]


def _ranges(numbers: set[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3 and 7."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
