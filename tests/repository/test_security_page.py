"""The limits that docs/security.md names are those of the server."""

from __future__ import annotations

import re
from pathlib import Path

from kt_sft.serving import limits

PAGE = Path(__file__).resolve().parents[2] / "docs" / "security.md"
UNITS = {"": 1, "s": 1, "KiB": 1 << 10, "MiB": 1 << 20}


def test_limits_of_the_page_are_those_of_the_code():
    found = re.findall(r"^\| `([A-Z_]+)` \| ([\d.]+) ?(\w*) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    said = {name: float(number) * UNITS[unit] for name, number, unit in found}
    assert said == {name: value for name, value in vars(limits).items() if name.isupper()}
