"""The compiler keeps the sums of the hot loops in registers, and native code does not call malloc."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.spills import parse, report

# Hot inner loops that each object file has at the very least: a file whose loops are not recognised fails, too.
LEAST_LOOPS = {
    "gemm_bf16_avx2": 10,
    "gemm_int8_avx2": 10,
    "gemm_int4_avx2": 10,
    "gemm_s8_avx2": 10,
    "gemm_f16_q8_avx2": 10,
    "gemm_q4_avx2": 10,
    "gemm_q5_avx2": 10,
    "gemm_q6_avx2": 10,
    "gemm_bf16_avx512": 10,
    "gemm_int8_avx512": 10,
    "gemm_int4_avx512": 10,
    "gemm_s8_avx512": 10,
    "gemm_f16_q8_avx512": 10,
    "gemm_q4_avx512": 10,
    "gemm_q5_avx512": 10,
    "gemm_q6_avx512": 10,
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


# Products of kRows x 16 floats. Of the 16 registers 6 x 2 sums leave room for the operands; 7 x 2 leave one too few.
TILE = """
#include <immintrin.h>

template <int kRows>
void tile(const float* a, const float* b, float* c, long k) {
  __m256 sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
  for (long i = 0; i < k; ++i) {
    const __m256 left = _mm256_loadu_ps(b + 16 * i), right = _mm256_loadu_ps(b + 16 * i + 8);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m256 x = _mm256_broadcast_ss(a + kRows * i + r);
      sum[r][0] = _mm256_fmadd_ps(x, left, sum[r][0]);
      sum[r][1] = _mm256_fmadd_ps(x, right, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    _mm256_storeu_ps(c + 16 * r, sum[r][0]);
    _mm256_storeu_ps(c + 16 * r + 8, sum[r][1]);
  }
}
template void tile<6>(const float*, const float*, float*, long);
template void tile<7>(const float*, const float*, float*, long);
template void tile<14>(const float*, const float*, float*, long);
"""


def disassemble(binary: Path) -> str:
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", binary.name]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=binary.parent).stdout


@pytest.fixture(scope="module")
def listing(static_library):
    return disassemble(static_library)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Functions of the compiled TILE."""
    source = tmp_path_factory.mktemp("tile") / "tile.cc"
    source.write_text(TILE)
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-O3", "-mavx2", "-mfma", "-ffp-contract=off", "-c", source.name]
    subprocess.run(command, check=True, cwd=source.parent)
    return parse(disassemble(source.with_suffix(".o")))


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


@pytest.mark.parametrize(("order", "found"), [(("write", "read"), 0), (("read", "write"), 1)])
def test_sums_carried_in_memory_are_told_from_values_put_aside(order, found):
    access = {"write": "vmovaps %ymm1,{slot}", "read": "vfmadd231ps {slot},%ymm0,%ymm2"}
    many_dots = ["vfmadd231ps %ymm0,%ymm0,%ymm3"] * 16  # so that the number of stores alone is tolerated
    body = "".join(f"  10:\t{line}\n" for line in [*(access[word] for word in order), *many_dots])
    text = LISTING.replace("  10:\tvmovaps %ymm1,{slot}\n", body).replace("{slot}", "-0x20(%rsp)")
    assert len(report(parse(text))[1]) == found


@pytest.mark.parametrize(("rows", "spills"), [(6, False), (7, True), (14, True)])
def test_the_check_sees_a_loop_with_more_sums_than_registers(tiles, rows, spills):
    loops, lines = report([f for f in tiles if f"tile<{rows}>" in f.name])
    assert loops == Counter({"tile": 1}), "the loop must be recognised"
    assert len(lines) == spills, lines


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
