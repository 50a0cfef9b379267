// TileOp = the instructions. g++ 12's intrinsics paste the tile id into the instruction's text and so take literals
// only; here it is a template argument. All statements are volatile: their order is the program's.
#pragma once
#include "tile_config.h"

namespace kts::amx {

struct TileOpHw {
  KTS_INLINE void configure(TileShape shape) { configure_tiles(shape); }

  template <int T>
  KTS_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  KTS_INLINE void load(const void* from, int64_t stride_bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(T) : "memory");
  }
  template <int T>
  KTS_INLINE void store(void* to, int64_t stride_bytes) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(T) : "memory");
  }
  // c += a b: bf16 pairs, sums in f32
  template <int C, int A, int B>
  KTS_INLINE void dot_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
  // c += a b: signed int8 quadruples, sums in int32
  template <int C, int A, int B>
  KTS_INLINE void dot_s8() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

}  // namespace kts::amx
