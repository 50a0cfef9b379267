"""`python -m tests.fuzz.child DOOR SEED FIRST LAST PULSE`: what `runner.run_in_child` starts."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.fuzz.runner import child_main

if __name__ == "__main__":
    door, seed, first, last, pulse = sys.argv[1:]
    child_main(door, int(seed), range(int(first), int(last)), Path(pulse))
