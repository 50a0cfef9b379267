"""Places for the nodes of a graph, in layers so that every arrow leads down; nodes of a circle share a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from scripts.import_graph.reading import components

Edges = Mapping[str, set[str]]
_SWEEPS = 40


@dataclass
class Layout:
    """Layers from top to bottom with the centres of their nodes, and for each arrow the points it passes."""

    layers: list[list[str]]
    centres: dict[str, float]
    arrows: dict[tuple[str, str], list[str]] = field(default_factory=dict)


def reduced(edges: Edges) -> dict[str, set[str]]:
    """The edges without those that a longer way implies; those of a circle stay."""
    group = _groups(edges)
    reach: dict[str, set[str]] = {}  # group -> groups below
    for component in components(edges):
        below = {group[target] for node in component for target in edges[node]} - {group[next(iter(component))]}
        reach[group[next(iter(component))]] = below.union(*(reach[one] for one in below))
    kept: dict[str, set[str]] = {}
    for node, targets in edges.items():
        implied = set().union(*(reach[group[target]] for target in targets if group[target] != group[node]))
        kept[node] = {target for target in targets if group[target] not in implied or group[target] == group[node]}
    return kept


def place(edges: Edges, widths: Mapping[str, float], *, width: float, gap: float) -> Layout:
    """Layers by the longest way down; within them an order with few crossings, and centres below what they hang from.

    Args:
        widths: of the nodes' boxes.
        width: of the picture; gap: between two boxes.
    """
    layer_of = _heights(edges)
    top = max(layer_of.values(), default=0)
    layers: list[list[str]] = [[] for _ in range(top + 1)]
    for node in sorted(edges):
        layers[top - layer_of[node]].append(node)
    links: dict[str, list[str]] = {node: [] for node in edges}
    layout = Layout(layers, {})
    for node in sorted(edges):
        for target in sorted(edges[node]):
            way = [node]
            for height in range(layer_of[node] - 1, layer_of[target], -1):
                bend = f"{node}>{target}@{height}"  # where the arrow passes a layer
                layers[top - height].append(bend)
                links[bend] = []
                way.append(bend)
            way.append(target)
            layout.arrows[node, target] = way
            if layer_of[node] != layer_of[target]:
                for upper, lower in zip(way, way[1:], strict=False):
                    links[upper].append(lower)
                    links[lower].append(upper)
    room = {node: widths.get(node, 10.0) for node in links}
    layout.centres = _centres(layers, links, room, width, gap)
    return layout


def _groups(edges: Edges) -> dict[str, str]:
    return {node: min(component) for component in components(edges) for node in component}


def _heights(edges: Edges) -> dict[str, int]:
    """The longest way from a node down to one that imports nothing."""
    group, heights = _groups(edges), {}
    for component in components(edges):
        below = [heights[target] + 1 for node in component for target in edges[node] if group[target] != group[node]]
        heights |= dict.fromkeys(component, max(below, default=0))
    return heights


def _centres(
    layers: list[list[str]], links: Mapping[str, list[str]], room: Mapping[str, float], width: float, gap: float
) -> dict[str, float]:
    """By turns, each layer is sorted by where its neighbours are and pushed apart again."""
    centres = {node: width * (at + 1) / (len(layer) + 1) for layer in layers for at, node in enumerate(layer)}
    for sweep in range(_SWEEPS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wanted = {
                node: sum(centres[other] for other in links[node]) / len(links[node]) if links[node] else centres[node]
                for node in layer
            }
            layer.sort(key=lambda node: wanted[node])
            _spread(layer, wanted, room, width, gap)
            centres |= {node: wanted[node] for node in layer}
    return centres


def _spread(layer: list[str], wanted: dict[str, float], room: Mapping[str, float], width: float, gap: float) -> None:
    """Move the centres of an ordered layer as little as keeps the boxes apart and within the width."""
    for _ in range(60):
        for first, second in zip(layer, layer[1:], strict=False):
            lacking = (room[first] + room[second]) / 2 + gap - (wanted[second] - wanted[first])
            if lacking > 0:
                wanted[first] -= lacking / 2
                wanted[second] += lacking / 2
        for node in layer:
            half = room[node] / 2
            wanted[node] = min(max(wanted[node], half), width - half)
