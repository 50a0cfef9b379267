"""The compiler keeps the sums of the hot loops in registers, and native code does not call malloc."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter

import pytest

from tests.helpers.spills import parse, report

# Hot inner loops that each object file has at the very least: a file whose loops are not recognised fails, too.
LEAST_LOOPS = {
    "gemm_bf16_avx2": 10,
    "gemm_int8_avx2": 10,
    "gemm_int4_avx2": 10,
    "gemm_s8_avx2": 10,
    "gemm_bf16_avx512": 10,
    "gemm_int8_avx512": 10,
    "gemm_int4_avx512": 10,
    "gemm_s8_avx512": 10,
    "gemm_s8_avx512vnni": 10,
    "gemm_bf16_avx512bf16": 10,
    "gemm_bf16_amx": 1,
    "gemm_s8_amx": 1,
}

LISTING = """
gemm_bf16_avx2.cc.o:     file format elf64-x86-64

0000000000000000 <void kts::micro()>:
   0:	lea    -0x40(%rsp),%rax
   4:	vxorps %xmm1,%xmm1,%xmm1
   8:	vmovups (%rdi),%ymm0
   c:	vfmadd231ps (%rsi),%ymm0,%ymm1
  10:	vmovaps %ymm1,{slot}
  14:	add    $0x20,%rsi
  18:	cmp    %rsi,%rdx
  1c:	jne    8 <void kts::micro()+0x8>
  20:	vmovaps %ymm1,-0x20(%rsp)
  24:	ret
"""


@pytest.fixture(scope="module")
def listing(static_library):
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(static_library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("slot", "found"), [("-0x20(%rsp)", 1), ("(%rax,%rcx,4)", 1), ("(%rdi)", 0), ("-0x20(%rbp)", 0)]
)
def test_the_check_sees_a_spill(slot, found):
    loops, lines = report(parse(LISTING.replace("{slot}", slot)))
    assert loops == Counter({"gemm_bf16_avx2": 1})
    assert len(lines) == found


def test_frame_pointer_counts_as_stack():
    text = LISTING.replace("{slot}", "-0x20(%rbp)").replace("vxorps %xmm1,%xmm1,%xmm1", "mov    %rsp,%rbp")
    assert len(report(parse(text))[1]) == 1


def test_hot_loops_keep_their_sums_in_registers(listing):
    functions = [f for f in parse(listing) if f.member.startswith("gemm_")]
    loops, lines = report(functions)
    assert {name: least for name, least in LEAST_LOOPS.items() if loops[name] < least} == {}, loops
    assert not lines, "\n".join(lines)


def test_native_code_does_not_call_malloc(static_library):
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    symbols = subprocess.run(["nm", "-u", str(static_library)], capture_output=True, text=True, check=True).stdout
    called = {line.split()[-1] for line in symbols.splitlines() if line.strip().startswith("U ")}
    assert not called & {"malloc", "calloc", "realloc", "aligned_alloc", "posix_memalign", "memalign", "strdup"}
