"""Random calls of the bindings: `python -m tests.helpers.native_calls --seed 1 --calls 10000 [--library FILE]`.

A call is right if it raises an exception of one line, or gives what the same values give as plain tensors, and writes
nothing else. Each seed is named before its calls begin, so that a crash tells which one to run again.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tests.helpers.native_call_args import Random, Written, plain, read

CALLS_OF_A_SEED = 250
# Of Python's own checks of a signature, pybind11's message has several lines.
_SIGNATURE = "The following argument types are supported"
_REFUSALS = (
    ValueError, TypeError, RuntimeError, MemoryError, OverflowError, BufferError, IndexError, AttributeError,
)  # fmt: skip

Arguments = Mapping[str, object]


class Wrong(Exception):
    """A call that neither was refused nor gave the right result."""


class Calls:
    """Makes calls, and counts what became of them."""

    def __init__(self, seed: int):
        self.random = Random(seed)
        torch.manual_seed(seed)
        self.kinds: Counter[str] = Counter()
        self.right: Counter[str] = Counter()

    def attempt(
        self,
        name: str,
        function: Callable[[Arguments], object],
        reads: Arguments,
        writes: Mapping[str, Written] | None = None,
        *,
        compare: bool = True,
        may_be_torch: bool = False,
    ) -> bool:
        """Call with varied arguments; True if it was not refused.

        Args:
            reads: right tensors, varied here; other values are passed as they are.
            writes: what the call is to fill.
            compare: with the same call of plain tensors.
            may_be_torch: torch is called first, and refuses in more than one line.
        """
        given = {key: read(self.random, value) if isinstance(value, Tensor) else value for key, value in reads.items()}
        outputs = {key: one.tensor for key, one in (writes or {}).items()}
        everything = self._aliased({**given, **outputs})
        before = {key: plain(everything[key]) for key in given}
        refusal = self._call(name, function, everything)
        if not may_be_torch and "\n" in refusal and _SIGNATURE not in refusal:
            raise Wrong(f"{name}: a refusal of several lines: {refusal!r}")
        for key, one in (writes or {}).items():
            if everything[key] is one.tensor and not one.is_intact():
                raise Wrong(f"{name}: bytes beside {key} were written")
        if refusal or not compare:
            return not refusal
        fresh = {key: _like(value) for key, value in outputs.items()}
        again = self._call(name, function, {**before, **fresh}, counts=False)
        if again:
            raise Wrong(f"{name}: accepted in one form, refused as plain tensors: {again}")
        for key, value in fresh.items():
            is_filled = everything[key] is outputs[key] and isinstance(value, Tensor)
            if is_filled and not _same(everything[key], value):
                raise Wrong(f"{name}: {key} differs from what plain tensors give")
        return True

    def _aliased(self, arguments: dict[str, object]) -> dict[str, object]:
        """Now and then with one argument in the place of another."""
        if len(arguments) > 1 and not self.random.is_calm and self.random.chance(0.05):
            one, other = self.random.sample(sorted(arguments), 2)
            return {**arguments, one: arguments[other]}
        return arguments

    def _call(
        self, name: str, function: Callable[[Arguments], object], arguments: Arguments, counts: bool = True
    ) -> str:
        """The refusal, empty if there was none."""
        self.kinds[name] += counts
        try:
            function(arguments)
        except _REFUSALS as error:
            return str(error) or "no text"
        self.right[name] += counts
        return ""

    def at_once(self, name: str, function: Callable[[], object]) -> None:
        """The same call from several threads."""
        results: list[object] = [None] * 3

        def run(i: int) -> None:
            try:
                results[i] = function()
            except _REFUSALS as error:
                results[i] = str(error)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.kinds[name] += 1
        self.right[name] += 1
        if any(not _same(result, results[0]) for result in results):
            raise Wrong(f"{name}: threads got different results")

    def in_a_child(self, name: str, function: Callable[[], object]) -> None:
        """The same call after fork()."""
        child = os.fork()
        if child == 0:
            try:
                function()
            except BaseException:
                os._exit(3)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        self.kinds[name] += 1
        self.right[name] += 1
        if status != 0:
            raise Wrong(f"{name}: ended with {status} in a forked child")


def _like(value: object) -> object:
    return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


def _same(one: object, other: object) -> bool:
    """Bit by bit, so that NaN are equal."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one == other if not isinstance(one, Tensor) and not isinstance(other, Tensor) else False
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not one.numel():
        return True
    bits, others = (plain(t).view(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(bits, others)


def use_library(path: Path) -> None:
    """Take another build of the extension than the one beside the package."""
    import kt_sft

    spec = importlib.util.spec_from_file_location("kt_sft._native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["kt_sft._native"] = kt_sft._native = module


def run_seed(seed: int, calls: int) -> Calls:
    """So many calls from one seed.

    Raises:
        Wrong: a call that is neither right nor refused.
    """
    from tests.helpers.native_call_kinds import Scene

    made = Calls(seed)
    with Scene(made) as scene, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about the odder kinds of tensors
        while made.kinds.total() < calls:
            scene.step()
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="the first one; each has 250 calls")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--library", type=Path, help="extension to call, instead of the package's own")
    args = parser.parse_args()
    if args.library:
        use_library(args.library.resolve())
    from kt_sft.native import native

    print(f"library {native().__file__}, torch {torch.__version__}, ISA {native().isa_active()}", flush=True)
    kinds: Counter[str] = Counter()
    right: Counter[str] = Counter()
    seed = args.seed
    wrong = 0
    while kinds.total() < args.calls:
        print(f"seed {seed}:", end=" ", flush=True)
        try:
            made = run_seed(seed, min(CALLS_OF_A_SEED, args.calls - kinds.total()))
        except Wrong as error:
            wrong += 1
            print(f"WRONG {error}", flush=True)
            kinds["wrong"] += CALLS_OF_A_SEED
        else:
            kinds += made.kinds
            right += made.right
            print(f"{made.right.total()} right, {made.kinds.total() - made.right.total()} refused", flush=True)
        gc.collect()
        seed += 1
    print("right by kind:", ", ".join(f"{name} {right[name]} of {count}" for name, count in sorted(kinds.items())))
    print(
        f"random calls: {kinds.total()}, seeds {args.seed} to {seed - 1}: {right.total()} right, "
        f"{kinds.total() - right.total() - kinds['wrong']} refused, {wrong} wrong"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
