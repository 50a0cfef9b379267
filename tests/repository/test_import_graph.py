"""The picture of the rooms: drawn from the real imports, every arrow down, nothing cut off."""

import re

from scripts.import_graph.__main__ import PICTURE, ROOT
from scripts.import_graph.drawing import WIDTH, draw
from scripts.import_graph.layout import place, reduced
from scripts.import_graph.reading import circles, read, rooms

CHAIN = {"cli": {"nn", "autograd", "sources"}, "sources": {"nn"}, "nn": {"autograd"}, "autograd": set()}


def test_picture_is_up_to_date():
    assert PICTURE.read_text() == draw(rooms(ROOT)), "python -m scripts.import_graph"


def test_every_arrow_leads_down_by_the_shortest_set_of_arrows():
    assert reduced(CHAIN) == {"cli": {"sources"}, "sources": {"nn"}, "nn": {"autograd"}, "autograd": set()}
    layout = place(CHAIN, dict.fromkeys(CHAIN, 60.0), width=400, gap=10)
    level = {node: number for number, layer in enumerate(layout.layers) for node in layer}
    assert all(level[source] < level[target] for source, target in layout.arrows)
    assert layout.arrows["cli", "autograd"][1:-1] == ["cli>autograd@2", "cli>autograd@1"]  # past the layers between


def test_an_arrow_of_a_circle_is_red():
    assert "#up)" not in draw(CHAIN)
    assert draw({**CHAIN, "autograd": {"nn"}}).count('marker-end="url(#up)"') == 2


def test_circles_are_shown_by_their_shortest_way():
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "c", "a"]]


def test_boxes_stay_apart_and_inside():
    edges = {"cli": {f"room{number}" for number in range(9)}} | {f"room{number}": set() for number in range(9)}
    boxes = [
        tuple(map(int, box)) for box in re.findall(r'<rect x="(\d+)" y="(\d+)" width="(\d+)" height="28"', draw(edges))
    ]
    assert len(boxes) == 10 and all(x >= 0 and x + width <= WIDTH for x, _, width in boxes)
    row = sorted(box for box in boxes if box[1] == boxes[-1][1])
    assert len(row) == 9 and all(one[0] + one[2] <= other[0] for one, other in zip(row, row[1:], strict=False))


def test_imports_within_functions_and_by_name_are_read(tmp_path):
    (tmp_path / "kt_sft/nn").mkdir(parents=True)
    text = "import importlib\ndef f():\n    from . import b\n    importlib.import_module('kt_sft.nn.c')\n"
    for name, content in {"a": text, "b": "", "c": ""}.items():
        (tmp_path / f"kt_sft/nn/{name}.py").write_text(content)
    assert {(one.importer, one.imported, one.line) for one in read(tmp_path)} == {
        ("kt_sft.nn.a", "kt_sft.nn.b", 3),
        ("kt_sft.nn.a", "kt_sft.nn.c", 4),
    }
