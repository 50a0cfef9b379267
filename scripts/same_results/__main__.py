"""Do two commits compute the same, bit by bit? `python -m scripts.same_results BASE [HEAD] [--isa avx2 ...]`

Each commit is checked out and built in a folder of its own, which a second run finds built; the working tree is not
touched. `probe.py` of the working tree runs in both: logits, gradients, a loss curve of five steps and the trained
factors of four families x three weight formats x instruction sets, the operator, and containers. Exit status 0 if all
digests are equal, 1 if one differs or is there on one side only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).with_name("probe.py")


def main() -> int:
    options = parse()
    console = Console(stderr=True)
    found = []
    for revision in (options.base, options.head):
        commit = git("rev-parse", "--verify", f"{revision}^{{commit}}")
        with console.status(f"{revision} ({commit[:12]}): building"):
            tree = built(commit, options.work)
        with console.status(f"{revision} ({commit[:12]}): computing"):
            found.append(probe(tree, options.isa))
    before, after = found
    differing = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    for key in differing:
        sides = [results.get(key, "missing")[:24] for results in found]
        console.print(f"[red]differs[/] {escape(key)}: {' | '.join(sides)}")
    console.print(f"{len(before)} results, {len(differing)} differ")
    return 1 if differing else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.same_results", description=__doc__.partition("\n")[0])
    parser.add_argument("base", help="a commit")
    parser.add_argument("head", nargs="?", default="HEAD", help="another one")
    parser.add_argument("--isa", nargs="+", default=["scalar", "avx2"], help="kernel levels that this CPU has")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "same_results", help="where both are built")
    return parser.parse_args()


def git(*args: str) -> str:
    done = subprocess.run(["git", "-C", ROOT, *args], check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"same_results: git {' '.join(args)}: {done.stderr.strip()}")
    return done.stdout.strip()


def built(commit: str, work: Path) -> Path:
    """A checkout of the commit with its native library."""
    tree = (work / commit).resolve()
    if not tree.is_dir():
        work.mkdir(parents=True, exist_ok=True)
        git("worktree", "prune")
        git("worktree", "add", "--detach", str(tree), commit)
    if not any(tree.glob("kt_sft/_native*.so")):
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tree, check=False, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"same_results: building {commit} failed:\n{done.stdout}{done.stderr}")
    return tree


def probe(tree: Path, isas: list[str]) -> dict[str, str]:
    """The digests of one tree."""
    env = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(PROBE), *isas], cwd=tree, env=env, check=False, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"same_results: the probe failed in {tree}:\n{done.stderr[-2000:]}")
    results = json.loads(done.stdout)
    home = results.pop("tree")
    if not Path(home).is_relative_to(tree):
        sys.exit(f"same_results: expected kt_sft of {tree}, found {home}; take PYTHONPATH and .pth files away")
    return results


if __name__ == "__main__":
    sys.exit(main())
