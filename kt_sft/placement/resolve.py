"""A model and rules -> Plan. Pure: nothing is moved or read, and a model on the meta device is enough.

Modules are visited from the root down. The first rule that matches one decides; what a rule leaves open, and a module
that none matches, is as for the module around it. Rules that decide nothing are faults, since a typing error in a regex
would otherwise put a layer where it does not fit.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from kt_sft.errors import ConfigError, nearest
from kt_sft.models.routers import find_routers
from kt_sft.models.spec import find_experts
from kt_sft.models.unwrapped import plain_modules
from kt_sft.placement import classes
from kt_sft.placement.classes import is_class
from kt_sft.placement.plan import EXPERTS, LINEAR, MODULE, Placement, Plan, layer_number
from kt_sft.placement.rules import Rule, RuleFile

NO_RULES = RuleFile("no rules", ())
_MOST_HINTS = 20  # each looks at all names of the model


def resolve(model: nn.Module, rules: RuleFile = NO_RULES, *, default_device: str = "cpu", method: str = "BF16") -> Plan:
    """Where everything goes.

    Args:
        model: as transformers builds it, its experts modules in place.
        default_device: of modules about which no rule says anything.
        method: format of experts about which no rule says anything.
    Raises:
        ConfigError: lists every fault: rules that match nothing, or modules that they cannot be for; a layer whose
            modules are apart; tied weights apart.
        UnsupportedModel: see `find_experts`.
    """
    experts = find_experts(model)
    layers_name = _layers_name(next(iter(experts)))
    routers = set(find_routers(plain_modules(model), {name: spec.num_experts for name, spec in experts.items()}))
    walk = _Walk(
        rules, set(experts), routers, _owners(model), layers_name, len(model.get_submodule(layers_name)), method
    )
    walk.visit(model, "", _Context(default_device))
    plan = Plan(tuple(walk.placements), layers_name)
    faults = [*walk.faults(), *walk.dead_rules(model), *_split_layers(plan), *_split_ties(walk.owners, plan)]
    if plan.packed_linears and not faults and plan.devices != ("cpu",):
        found = f"found {', '.join(plan.devices)}; use class default"
        faults.append(f"{rules.path}: PackedLinear: expected everything on the CPU, {found}")
    if faults:
        raise ConfigError(faults)
    return plan


@dataclass(frozen=True)
class _Context:
    """What a module gets from those around it."""

    device: str
    rule: int | None = None
    closed_by: int | None = None  # rule that is not recursive


@dataclass
class _Walk:
    rules: RuleFile
    experts: set[str]
    routers: set[str]
    owners: dict[int, list[str]]
    layers_name: str
    num_layers: int
    method: str
    placements: list[Placement] = field(default_factory=list)
    used: Counter[int] = field(default_factory=Counter)
    taken_by: dict[int, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    misfits: dict[tuple[int, str], list[str]] = field(default_factory=lambda: defaultdict(list))

    def visit(self, module: nn.Module, name: str, context: _Context) -> None:
        """Decide a module, then those below it."""
        rule = self._decide(module, name, context)
        if name in self.experts:
            self._place_experts(name, rule, context)
            return
        if rule is not None:
            device = rule.device or context.device
            context = _Context(device, rule.number, None if rule.recursive else rule.number)
        self._place(module, name, rule, context)
        for child, inner in module.named_children():
            self.visit(inner, f"{name}.{child}" if name else child, context)

    def _decide(self, module: nn.Module, name: str, context: _Context) -> Rule | None:
        """The first rule that matches; notes which rules it takes the module away from."""
        matching = [rule for rule in self.rules.rules if self._matches(rule, module, name)]
        winner = context.closed_by or (matching[0].number if matching else None)
        for rule in matching:
            if rule.number != winner:
                self.taken_by[rule.number][winner or 0] += 1
        if context.closed_by is not None or not matching:
            return None
        self.used[matching[0].number] += 1
        return matching[0]

    def _matches(self, rule: Rule, module: nn.Module, name: str) -> bool:
        if rule.name is not None and not rule.name.search(name):
            return False
        if rule.layers is not None:
            number = layer_number(name, self.layers_name)
            if number is None or number not in rule.layers.range(self.num_layers):
                return False
        return rule.class_name is None or is_class(module, rule.class_name)

    def _place_experts(self, name: str, rule: Rule | None, context: _Context) -> None:
        method = self.method
        if rule is not None and rule.target == classes.EXPERTS:
            method = rule.method or method
            if rule.out_device not in (None, context.device):
                what = (
                    f"out_device {rule.out_device}: the block around it is on {context.device}, where results go back"
                )
                self.misfits[rule.number, what].append(name)
        elif rule is not None and rule.target != classes.STOCK:
            self.misfits[rule.number, f"routed experts cannot be of class {rule.target}"].append(name)
        self.placements.append(Placement(name, EXPERTS, "cpu", method, rule.number if rule else context.rule))

    def _place(self, module: nn.Module, name: str, rule: Rule | None, context: _Context) -> None:
        is_linear = isinstance(module, nn.Linear)
        if rule is not None and rule.target == classes.EXPERTS:
            self.misfits[rule.number, "RoutedExperts is for routed experts"].append(name)
        elif rule is not None and rule.target in (classes.LINEAR, classes.PACKED_LINEAR) and not is_linear:
            self.misfits[rule.number, "a linear layer's class is for torch.nn.Linear"].append(name)
        elif rule is not None and rule.target == classes.PACKED_LINEAR and (why := self._unpackable(module, name)):
            self.misfits[rule.number, f"PackedLinear is not for {why}"].append(name)
        if next(module.parameters(recurse=False), None) is None and next(module.buffers(recurse=False), None) is None:
            return
        if rule is not None and rule.target == classes.PACKED_LINEAR:
            device = rule.device or "cpu"
            self.placements.append(Placement(name, LINEAR, device, rule.method or "bf16", rule.number))
        else:
            self.placements.append(Placement(name, MODULE, context.device, None, context.rule))

    def _unpackable(self, linear: nn.Linear, name: str) -> str | None:
        """Why our kernels cannot have a linear layer's weight."""
        if type(linear) is not nn.Linear:
            return f"a {type(linear).__name__}, which computes something else"
        if name in self.routers:
            return "routers, whose weights models read themselves"
        return "weights that several modules share" if len(self.owners[id(linear.weight)]) > 1 else None

    def faults(self) -> Iterator[str]:
        """Rules that decide modules they are not for."""
        for (number, what), names in self.misfits.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield f"{self.rules.path}, rule {number}: {what}, found {names[0] or 'the model'}{more}"

    def dead_rules(self, model: nn.Module) -> Iterator[str]:
        """Rules that decide nothing, and why."""
        hints = 0
        for rule in self.rules.rules:
            is_empty_part = rule.layers is not None and rule.layers.parts and not rule.layers.range(self.num_layers)
            if self.used[rule.number] or is_empty_part:  # a model of three layers has no first quarter
                continue
            takers = [number for number, _ in self.taken_by[rule.number].most_common()]
            if takers:
                count = sum(self.taken_by[rule.number].values())
                numbers = ", ".join(str(number) for number in sorted(takers))
                why = f"the {count} modules that it picks are decided by rule {numbers} before it"
                yield f"{self.rules.where(rule)}: has no effect: {why}; move it up or remove it"
            else:
                hints += 1
                hint = f"; {self._hint(rule, model)}" if hints <= _MOST_HINTS else ""
                yield f"{self.rules.where(rule)}: matches no module{hint}"

    def _hint(self, rule: Rule, model: nn.Module) -> str:
        """The nearest known name of the part that fails."""
        if rule.class_name is not None and not any(is_class(module, rule.class_name) for module in model.modules()):
            names = sorted({type(module).__name__ for module in model.modules()})
            hint = nearest(rule.class_name.rpartition(".")[2], names)
            return f"the model has no {rule.class_name}, {hint if hint.startswith('did') else 'see kt-sft plan'}"
        names = [name for name, _ in model.named_modules()]
        if rule.name is not None and not any(rule.name.search(name) for name in names):
            kinds = sorted({re.sub(r"\.\d+(?=\.|$)", ".0", name) for name in names if name})
            literal = re.sub(r"\\d|\(.*?\)|\[.*?\]", "0", rule.name.pattern)
            literal = re.sub(r"[\\^$*+?|]", "", literal)
            close = difflib.get_close_matches(literal, kinds, n=1, cutoff=0.3)
            return f"name {rule.name.pattern!r} fits no module" + (f", did you mean {close[0]!r}?" if close else "")
        return f"name, class and layers never fit the same module; the model has {self.num_layers} layers"


def _layers_name(experts_name: str) -> str:
    """Path of the list of decoder layers, from the name of an experts module."""
    found = re.match(r"(.*?)\.\d+\.", experts_name)
    assert found is not None, experts_name
    return found.group(1)


def _split_layers(plan: Plan) -> Iterator[str]:
    """Layers add their input to what their parts give: these must be on one device."""
    parts: dict[int, dict[str, Placement]] = defaultdict(dict)
    for placement in plan.placements:
        number = plan.layer_of(placement.name)
        if number is not None and placement.kind != EXPERTS:
            parts[number].setdefault(placement.device, placement)
    split = {number: by_device for number, by_device in parts.items() if len(by_device) > 1}
    if split:
        number, by_device = next(iter(split.items()))
        found = ", ".join(f"{part.name} on {device} ({_by(part)})" for device, part in by_device.items())
        more = f", and {len(split) - 1} more layers like it" if len(split) > 1 else ""
        yield f"{plan.layers_name}.{number}: expected all modules but the experts on one device, found {found}{more}"


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold a parameter, by its identity."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(name)
    return owners


def _split_ties(owners: dict[int, list[str]], plan: Plan) -> Iterator[str]:
    """Modules that share a weight must share a device."""
    by_name = {placement.name: placement for placement in plan.placements}
    for names in owners.values():
        placed = [by_name[name] for name in names if name in by_name]
        if len({placement.device for placement in placed}) > 1:
            found = ", ".join(f"{p.name} on {p.device} ({_by(p)})" for p in placed)
            yield f"tied weights: expected modules that share a weight on one device, found {found}"


def _by(placement: Placement) -> str:
    return "no rule" if placement.rule is None else f"rule {placement.rule}"
