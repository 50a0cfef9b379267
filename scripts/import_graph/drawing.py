"""The rooms of the package and their arrows as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from scripts.import_graph.layout import Edges, Layout, place, reduced
from scripts.import_graph.reading import LEAVES

WIDTH = 880
_MARGIN, _BOX, _LAYER, _GAP, _LETTER = 16, 28, 66, 14, 7.4
_TITLE = 30
# Rooms by what they are for -> colour of the box.
_KINDS = {
    "doors": ("#dbe9fb", ("__init__", "cli", "doctor", "serving", "inference", "operator")),
    "other libraries": ("#fbe7d0", ("integrations", "compat")),
    "files": ("#e2f0d9", ("adapters", "convert", "formats", "sources")),
    "computing": ("#eadcf5", ("autograd", "native", "nn", "residency", "runtime", "schedule", "transfer")),
}
_OTHERS = "#eeeeee"


def draw(edges: Edges) -> str:
    """The picture of room -> rooms that it imports."""
    upper = {room: targets - LEAVES for room, targets in edges.items() if room not in LEAVES}
    lower = {room: targets & LEAVES for room, targets in edges.items() if room in LEAVES}
    parts: list[str] = []
    y = _MARGIN
    for title, part in (("", upper), ("leaves: used by the rooms above", lower)):
        if title:
            parts.append(f'<line x1="0" y1="{y}" x2="{WIDTH}" y2="{y}" stroke="#999" stroke-dasharray="4 4"/>')
            parts.append(f'<text x="{_MARGIN}" y="{y + 20}" fill="#555">{title}</text>')
            y += _TITLE
        kept = reduced(part)
        widths = {room: len(_name(room)) * _LETTER + 20 for room in kept}
        layout = place(kept, widths, width=WIDTH - 2 * _MARGIN, gap=_GAP)
        parts += _arrows(layout, widths, y)
        parts += _boxes(layout, widths, y)
        y += len(layout.layers) * _LAYER
    parts.append(_legend(y))
    height = y + 34
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"',
            '     font-family="DejaVu Sans, Verdana, sans-serif" font-size="13">',
            "<title>Rooms of kt_sft and their imports; drawn by scripts/import_graph</title>",
            "<defs>" + _head("down", "#555") + _head("up", "#c00") + "</defs>",
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def _name(room: str) -> str:
    return {"__init__": "kt_sft"}.get(room, room.removeprefix("integrations."))


def _colour(room: str) -> str:
    return next((colour for colour, rooms in _KINDS.values() if room.split(".")[0] in rooms), _OTHERS)


def _head(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{colour}"/></marker>'
    )


def _boxes(layout: Layout, widths: Mapping[str, float], y: float) -> list[str]:
    found = []
    for number, layer in enumerate(layout.layers):
        for room in (one for one in layer if one in widths):
            left, top = _MARGIN + layout.centres[room] - widths[room] / 2, y + number * _LAYER
            found.append(
                f'<rect x="{left:.0f}" y="{top}" width="{widths[room]:.0f}" height="{_BOX}" rx="5" '
                f'fill="{_colour(room)}" stroke="#666"/>'
                f'<text x="{_MARGIN + layout.centres[room]:.0f}" y="{top + 19}" text-anchor="middle">'
                f"{escape(_name(room))}</text>"
            )
    return found


def _arrows(layout: Layout, widths: Mapping[str, float], y: float) -> list[str]:
    """A curve for each, from the bottom of a box to the top of another one, straight through the layers between."""
    level = {node: number for number, layer in enumerate(layout.layers) for node in layer}
    found = []
    for (source, target), way in layout.arrows.items():
        x = {node: _MARGIN + layout.centres[node] for node in way}
        if level[source] == level[target]:
            side = 1 if x[target] > x[source] else -1
            ends = x[source] + side * widths[source] / 2, x[target] - side * widths[target] / 2
            middle = y + level[source] * _LAYER + _BOX / 2
            found.append(
                f'<path d="M{ends[0]:.0f} {middle:.0f} {ends[1]:.0f} {middle:.0f}" fill="none" stroke="#c00" '
                'marker-end="url(#up)"/>'
            )
            continue
        at = y + level[source] * _LAYER + _BOX
        path = f"M{x[source]:.0f} {at}"
        for node in way[1:]:
            top = y + level[node] * _LAYER
            previous = x[way[way.index(node) - 1]]
            half = (top - at) / 2
            path += f" C{previous:.0f} {at + half:.0f} {x[node]:.0f} {top - half:.0f} {x[node]:.0f} {top}"
            if node != target:
                path += f" V{top + _BOX}"
            at = top + _BOX
        found.append(f'<path d="{path}" fill="none" stroke="#777" marker-end="url(#down)"/>')
    return found


def _legend(y: float) -> str:
    parts, x = [], float(_MARGIN)
    for title, (colour, _) in _KINDS.items():
        parts.append(f'<rect x="{x:.0f}" y="{y}" width="14" height="14" rx="3" fill="{colour}" stroke="#666"/>')
        parts.append(f'<text x="{x + 20:.0f}" y="{y + 12}" fill="#555">{title}</text>')
        x += 20 + len(title) * _LETTER + 26
    return "".join(parts)
