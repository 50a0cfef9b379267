"""Reads objdump's listing of the native library and finds vector registers that inner loops keep on the stack."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

# What the hot loops are there for; a loop without one of these is not hot.
DOT = re.compile(
    r"v(fn?m(add|sub)(132|213|231)ps|pdpbusds?|pdpwssds?|pmaddwd|pmaddubsw|dpbf16ps)$|tdp(bf16ps|bssd|busd|bsud)$"
)
MEMBER = re.compile(r"^(\S+?)(?:\.cc)?\.o:\s+file format")
FUNCTION = re.compile(r"^([0-9a-f]+) <(.*)>:$")
INSTRUCTION = re.compile(r"^\s+([0-9a-f]+):\s+(?:(?:rep|repz|notrack|bnd|data16|cs) )*(\S+)\s*(.*)$")
JUMP = re.compile(r"^([0-9a-f]+) <")
# Per dot product of a loop; a sum that lives in memory from one round to the next is never tolerated. Stores: a vector
# put aside within a round. Loads: where the registers do not reach for constants, such as the scales of int4, they are
# read again as memory operands, which hides behind the arithmetic.
TOLERATED_STORES = 1 / 8
TOLERATED_LOADS = 2 / 3
VECTOR = re.compile(r"%([xyz]mm\d+|tmm\d)")
SLOT = re.compile(r"[-\w]*\([^)]*\)")
MEMORY = re.compile(r"\((%\w+)?(?:,(%\w+))?")


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str

    def slot(self) -> str:
        """The memory operand."""
        return SLOT.search(self.operands)[0]

    def is_store(self) -> bool:
        return self.operands.endswith(")")


class HotLoop(NamedTuple):
    length: int  # instructions
    dots: int
    on_stack: list[Instruction]  # that move vectors from or to the stack

    def carried(self) -> set[str]:
        """Places on the stack that a round reads before it writes them, for the next round: sums."""
        written_first: dict[str, bool] = {}
        for i in self.on_stack:
            written_first.setdefault(i.slot(), i.is_store())
        return {i.slot() for i in self.on_stack if i.is_store() and not written_first[i.slot()]}

    def spills(self) -> bool:
        """Whether sums, and not just constants, live on the stack."""
        stores = sum(1 for i in self.on_stack if i.is_store())
        loads = len(self.on_stack) - stores
        return bool(self.carried()) or stores > TOLERATED_STORES * self.dots or loads > TOLERATED_LOADS * self.dots


@dataclass
class Function:
    member: str  # source file, which tells the instruction set: gemm_bf16_avx2
    name: str
    code: list[Instruction] = field(default_factory=list)

    def keeps_frame(self) -> bool:
        """Whether rbp is the frame and not one more register."""
        return any(i.name == "mov" and i.operands == "%rsp,%rbp" for i in self.code)

    def inner_loops(self) -> list[tuple[int, int]]:
        """First and last index of every backward jump's range that holds no other one."""
        index = {i.address: n for n, i in enumerate(self.code)}
        ranges = set()
        for n, i in enumerate(self.code):
            target = JUMP.match(i.operands) if i.name.startswith("j") else None
            start = index.get(int(target[1], 16)) if target else None
            if start is not None and start <= n:
                ranges.add((start, n))
        return [
            r
            for r in sorted(ranges)
            if not any(r != other and r[0] <= other[0] and other[1] <= r[1] for other in ranges)
        ]

    def stack_registers(self, loop: tuple[int, int]) -> set[str]:
        """Registers that point into the stack frame while the loop runs: arrays of sums that ended in memory."""
        frame = {"%rsp"} | ({"%rbp"} if self.keeps_frame() else set())
        found = set(frame)
        for i in self.code[: loop[0]]:
            source, _, target = i.operands.rpartition(",")
            if not target.startswith("%r") or i.name in ("cmp", "test", "push"):
                continue
            base = MEMORY.search(source)
            points = (i.name == "lea" and base and base[1] in found) or (i.name == "mov" and source in found)
            if points:
                found.add(target)
            elif target not in frame:
                found.discard(target)
        return found

    def hot_loops(self) -> list[HotLoop]:
        loops = []
        for first, last in self.inner_loops():
            body = self.code[first : last + 1]
            dots = sum(1 for i in body if DOT.match(i.name))
            if dots == 0:
                continue
            stack = self.stack_registers((first, last))
            on_stack = [
                i
                for i in body
                if VECTOR.search(i.operands) and (base := MEMORY.search(i.operands)) and {base[1], base[2]} & stack
            ]
            loops.append(HotLoop(len(body), dots, on_stack))
        return loops


def parse(listing: str) -> list[Function]:
    """Functions of `objdump -d -C --no-show-raw-insn` of a static library."""
    functions: list[Function] = []
    member = ""
    for line in listing.splitlines():
        if found := MEMBER.match(line):
            member = found[1]
        elif found := FUNCTION.match(line):
            functions.append(Function(member, found[2]))
        elif functions and (found := INSTRUCTION.match(line)):
            operands = found[3].split("#")[0].strip()
            functions[-1].code.append(Instruction(int(found[1], 16), found[2], operands))
    return functions


def report(functions: list[Function]) -> tuple[Counter[str], list[str]]:
    """Hot inner loops per source file, and one line for each that works on the stack."""
    loops: Counter[str] = Counter()
    lines = []
    for function in functions:
        for loop in function.hot_loops():
            loops[function.member] += 1
            if loop.spills():
                lines.append(
                    f"{function.member} {function.name}: loop of {loop.length} instructions, {loop.dots} dot products, "
                    f"{len(loop.on_stack)} vectors on the stack: "
                    + "; ".join(f"{i.name} {i.operands}" for i in loop.on_stack[:3])
                )
    return loops, lines
