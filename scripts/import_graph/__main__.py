"""Draws docs/import_graph.svg from the package's real imports: `python -m scripts.import_graph [--check | --why A B]`

Boxes are the rooms of kt_sft, arrows who imports whom. An arrow that a longer way implies is left out, and so are those
to the leaves, which are drawn apart. An arrow of a circle is red and does not lead down.
`--check` compares and does not write; exit status 1: the picture is not up to date. `--why` lists the imports that make
one arrow.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scripts.import_graph.drawing import draw
from scripts.import_graph.reading import read, room_of, rooms

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "import_graph.svg"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.import_graph", description=__doc__.partition(":")[0])
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true", help="compare with the picture that is there, write nothing")
    choice.add_argument("--why", nargs=2, metavar=("A", "B"), help="the imports of room B in room A")
    options = parser.parse_args()
    if options.why:
        for found in read(ROOT):
            ends = [room_of(module).removeprefix("integrations.") for module in (found.importer, found.imported)]
            if ends == options.why:
                print(f"{found.path}:{found.line}: {found.imported}")
        return 0
    picture = draw(rooms(ROOT))
    if options.check:
        is_same = PICTURE.is_file() and PICTURE.read_text(encoding="utf-8") == picture
        print("up to date" if is_same else f"{PICTURE.name} is out of date: python -m scripts.import_graph")
        return 0 if is_same else 1
    PICTURE.write_text(picture, encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
