"""Child processes that are killed with signal 9 while they write: forked, so that none of them has to start up."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kt_sft.formats import renaming

# What a writer does to the disk; the last one is an exchange of two names.
STEPS = ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir"), (os, "link"), (os, "unlink"), (os, "rmdir"))
STEPS = (*STEPS, (renaming, "_rename"))


def forked(action: Callable[[], Any], *, kill_after: float | None = None) -> tuple[bool, float]:
    """Run `action` in a child.

    Args:
        kill_after: seconds from its beginning until it is killed; None: it is left alone.
    Returns:
        Whether it was killed, and the seconds that it took.
    """
    ready, begins = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(begins, b"x")
            action()
            code = 0
        finally:
            os._exit(code)
    os.read(ready, 1)
    start = time.perf_counter()
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    took = time.perf_counter() - start
    os.close(ready)
    os.close(begins)
    assert code in (0, -signal.SIGKILL), f"the child failed with {code}"
    return code != 0, took


def at_random(
    prepare: Callable[[], Any], action: Callable[[], Any], check: Callable[[], str], *, count: int, seed: int
) -> Counter:
    """Prepare, kill the action at a random moment of its duration, check; `count` times.

    Args:
        check: says which state it finds, and that the next run works.
    Returns:
        How often each state was found after a kill, and `finished` for those that were faster.
    """
    durations = []
    for _ in range(3):
        prepare()
        durations.append(forked(action)[1])
        check()
    longest, generator, found = sorted(durations)[1], random.Random(seed), Counter()
    for _ in range(count):
        prepare()
        was_killed, _ = forked(action, kill_after=generator.uniform(0, longest))
        state = check()
        found[state if was_killed else "finished"] += 1
    print(f"seed {seed}: {count} kills within {longest * 1e3:.0f} ms: {dict(found)}")
    return found


def at_every_step(
    prepare: Callable[[], Any], action: Callable[[], Any], check: Callable[[], str], *, stride: int = 1
) -> Counter:
    """The same, killed before each thing that the action does to the disk, or each `stride`-th."""
    found: Counter = Counter()
    number = 0
    while True:
        prepare()
        was_killed, _ = forked(lambda number=number: _dying_at(number, action))
        if not was_killed:
            return found
        found[check()] += 1
        number += stride


def _dying_at(number: int, action: Callable[[], Any]) -> None:
    remaining = [number]

    def hooked(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if remaining[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            remaining[0] -= 1
            return real(*args, **kwargs)

        return call

    for module, name in STEPS:
        setattr(module, name, hooked(getattr(module, name)))
    action()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
