// bf16 rows on AVX512-BF16. A dword of a packed tile is the pair of k that VDPBF16PS multiplies with a broadcast pair of a
// row and adds to the f32 sum of its n. 12 rows x 32 columns: 24 sums, 2 weight vectors, 1 broadcast of 32 registers.
//
// Every product is one micro-kernel on a stream of steps, 2 KiB each: 32 of the sum x 32 columns as two tiles
// [16 pairs][16 columns][2]. A bf16 panel is that stream as it lies in memory; int8 and int4 are unpacked to it, exactly (q;
// q * scale); for the input gradient tiles are transposed to it, so that pairs are of n and lanes are k.
//
// VDPBF16PS rounds to nearest even after each of its two multiply-adds and flushes denormals, as inputs and as sums.
#include <cstring>

#include "../prefetch_inl.h"
#include "../vec_avx512.h"
#include "../with_rows_inl.h"
#include "kts/kernel.h"
#include "unpack_avx512.h"

namespace kts::avx512bf16 {

namespace {

using avx512::Vec;

constexpr int kRows = 12;
constexpr int kGemvRows = 4;
constexpr int64_t kStepBytes = 2 * kTileBytes;
constexpr int64_t kPassSteps = 16;  // 512 of the sum: a pass of all panels of a task fits the second-level cache
constexpr int64_t kPassBytes = kPassSteps * kStepBytes;
constexpr int64_t kGemvSteps = 128;
constexpr int64_t kMaxSteps = kGemvSteps;
constexpr int64_t kStride = kPassSteps * kTileK + 32;      // bf16 elements; off a power of two, for the cache sets
constexpr int64_t kGemvStride = kGemvSteps * kTileK + 32;  // bf16 elements
static_assert(kRows * kStride * 2 + (kMaxTaskPanels * kPassSteps + 1) * kStepBytes <= kGemmScratchBytes);
static_assert(kGemvRows * kGemvStride * 2 <= kGemmScratchBytes && kMaxSteps >= kPassSteps);

// sum += pairs of a * pairs of b. As an intrinsic, g++ 12 keeps such sums on the stack.
KTS_INLINE void dot(__m512& sum, __m512i a, __m512i b) { __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

KTS_INLINE __m512i broadcast_pair(const bf16_t* pair) {
  int32_t bits;
  std::memcpy(&bits, pair, sizeof(bits));
  return _mm512_set1_epi32(bits);
}

// a [rows, elements]: rows from begin on, `valid` elements readable, zeros up to whole steps; times scales (if any),
// rounded.
KTS_INLINE void gather(const bf16_t* const* rows, int64_t count, int64_t begin, int64_t valid, int64_t steps,
                       const float* scales, bf16_t* a, int64_t stride) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t e = 0; e < steps * kTileK; e += 16) {
      const int64_t left = valid - e;
      const __mmask16 mask = left >= 16 ? __mmask16{0xffff} : left <= 0 ? __mmask16{0} : Vec::first_lanes(left);
      __m256i bits = _mm256_maskz_loadu_epi16(mask, rows[i] + begin + e);
      if (scales != nullptr)
        bits = Vec::to_bf16(_mm512_mul_ps(Vec::from_bf16(bits), _mm512_maskz_loadu_ps(mask, scales + e)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(a + i * stride + e), bits);
    }
}

// c [R, 32] (+)= a b over `steps` steps. kCold: b comes from memory. Inlined, the sums would spill among its callers'
// variables.
template <int R, bool kCold>
[[gnu::noinline]] void micro(const bf16_t* a, const uint8_t* b, int64_t steps, float* c, int64_t ldc, bool from_c) {
  KTS_DCHECK(steps >= 1 && steps <= kPassSteps);
  __m512 left[R], right[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    left[i] = from_c ? Vec::load(c + i * ldc) : Vec::zero();
    right[i] = from_c ? Vec::load(c + i * ldc + 16) : Vec::zero();
  }
  StreamAhead ahead(b + kPrefetchBytes, 0);
  for (int64_t t = 0; t < steps; ++t, b += kTileBytes)
    for (int pair = 0; pair < kTileK / 2; ++pair, a += 2, b += 64) {
      if constexpr (kCold) ahead.step<1, 2>();
      const __m512i w0 = _mm512_loadu_si512(b), w1 = _mm512_loadu_si512(b + kTileBytes);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const __m512i x = broadcast_pair(a + i * kStride);
        dot(left[i], x, w0);
        dot(right[i], x, w1);
      }
    }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    Vec::store(c + i * ldc, left[i]);
    Vec::store(c + i * ldc + 16, right[i]);
  }
}

KTS_INLINE void scale_columns(const float* scales, int64_t rows, float* c, int64_t ldc) {
  const __m512 left = Vec::load(scales), right = Vec::load(scales + 16);
  for (int64_t i = 0; i < rows; ++i, c += ldc) {
    Vec::store(c, Vec::mul(Vec::load(c), left));
    Vec::store(c + 16, Vec::mul(Vec::load(c + 16), right));
  }
}

template <Format kFormat>
void forward(const GemmTask& task) {
  KTS_DCHECKED(check_task(task, {kFormat, Rows::kBf16, Direction::kForward}));
  constexpr bool kUnpacks = kFormat != Format::kBf16;
  const PackedMatrix& w = *task.w;
  const int64_t k_tiles = w.k_panels(), panels = task.panel_end - task.panel_begin;
  bf16_t* a = static_cast<bf16_t*>(task.scratch);
  uint8_t* unpacked = reinterpret_cast<uint8_t*>(a + kRows * kStride);
  for (int64_t t0 = 0; t0 < k_tiles; t0 += kPassSteps) {
    const int64_t steps = min_i64(kPassSteps, k_tiles - t0), k0 = t0 * kTileK;
    const bool from_c = task.accumulate || t0 > 0;
    if constexpr (kUnpacks)
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t t = 0; t < steps; ++t)
          avx512::unpack_bf16_tiles<kFormat>(w, task.panel_begin + p, t0 + t,
                                             unpacked + p * kPassBytes + t * kStepBytes);
    for (int64_t i = 0; i < task.m; i += kRows) {
      const int64_t rows = min_i64(kRows, task.m - i);
      gather(task.a_rows + i, rows, task.a_offset + k0, w.k - k0, steps, nullptr, a, kStride);
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t panel = task.panel_begin + p;
        const uint8_t* b = kUnpacks ? unpacked + p * kPassBytes : w.panel(panel) + t0 * kStepBytes;
        float* c = task.c + i * task.ldc + p * kPanel;
        with_rows<kRows>(rows, [&]<int R>() {
          if (!kUnpacks && i == 0)
            micro<R, true>(a, b, steps, c, task.ldc, from_c);
          else
            micro<R, false>(a, b, steps, c, task.ldc, from_c);
        });
        if (kFormat == Format::kInt8 && t0 + steps == k_tiles)
          scale_columns(w.int8_scales() + panel * kPanel, rows, c, task.ldc);
      }
    }
  }
}

// A packed tile (16 n x 32 k) as 8 pairs of n of both column tiles: pair j of column half h at to + h * 1 KiB + j * 64.
KTS_INLINE void transpose_tile(const uint8_t* tile, uint8_t* to) {
  __m512i low_k, high_k;
  {
    alignas(64) uint16_t low[32], high[32];
    for (int i = 0; i < 32; ++i) {
      low[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
      high[i] = static_cast<uint16_t>(16 + i / 2 + i % 2 * 32);
    }
    low_k = _mm512_load_si512(low);
    high_k = _mm512_load_si512(high);
  }
  __m512i n[kTileN];
#pragma GCC unroll 16
  for (int i = 0; i < kTileN; ++i) n[i] = _mm512_loadu_si512(tile + i * 64);
  Vec::transpose(n);
#pragma GCC unroll 8
  for (int j = 0; j < kTileN / 2; ++j) {
    _mm512_storeu_si512(to + j * 64, _mm512_permutex2var_epi16(n[2 * j], low_k, n[2 * j + 1]));
    _mm512_storeu_si512(to + kTileBytes + j * 64, _mm512_permutex2var_epi16(n[2 * j], high_k, n[2 * j + 1]));
  }
}

template <Format kFormat>
void input_grad(const GemmTask& task) {
  KTS_DCHECKED(check_task(task, {kFormat, Rows::kBf16, Direction::kInputGrad}));
  const PackedMatrix& w = *task.w;
  const int64_t panels = task.panel_end - task.panel_begin;
  bf16_t* a = static_cast<bf16_t*>(task.scratch);
  uint8_t* weights = reinterpret_cast<uint8_t*>(a + kRows * kStride);
  uint8_t* step = weights + kMaxTaskPanels * kPassBytes;
  for (int64_t n0 = 0; n0 < w.n; n0 += kPassSteps * kPanel) {
    const int64_t steps = min_i64(kPassSteps, ceil_div(w.n - n0, kPanel));
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t n_panel = n0 / kPanel + t, k_tile = task.panel_begin + p;
        const uint8_t* from = step;
        if constexpr (kFormat == Format::kBf16) {
          from = w.panel(n_panel) + k_tile * kStepBytes;
          const uint8_t* ahead = from + w.panel_stride_bytes;
          for (int64_t line = 0; line < kStepBytes; line += 64) __builtin_prefetch(ahead + line);
        } else {
          avx512::unpack_bf16_tiles<kFormat>(w, n_panel, k_tile, step);
        }
        uint8_t* to = weights + p * kPassBytes + t * kStepBytes;
        transpose_tile(from, to);
        transpose_tile(from + kTileBytes, to + kTileBytes / 2);
      }
    for (int64_t i = 0; i < task.m; i += kRows) {
      const int64_t rows = min_i64(kRows, task.m - i);
      gather(task.a_rows + i, rows, task.a_offset + n0, w.n - n0, steps,
             kFormat == Format::kInt8 ? w.int8_scales() + n0 : nullptr, a, kStride);
      for (int64_t p = 0; p < panels; ++p) {
        float* c = task.c + i * task.ldc + p * kPanel;
        with_rows<kRows>(rows, [&]<int R>() {
          micro<R, false>(a, weights + p * kPassBytes, steps, c, task.ldc, task.accumulate || n0 > 0);
        });
      }
    }
  }
}

// --- up to 4 rows: weights go from memory through registers into the dot products ---

// Sums of one panel: even and odd pairs apart, since so few rows alone do not hide the latency of the dot products.
template <int R>
struct GemvSums {
  __m512 even[2][R], odd[2][R];
};

template <int R>
KTS_INLINE void add_pairs(__m512 (&sums)[R], const bf16_t* a, __m512i pairs) {
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) dot(sums[i], broadcast_pair(a + i * kGemvStride), pairs);
}

// One tile half: 32 k x 16 n of tile column `half`; a at its first k. kRounds: WeightFormat::any_scale.
template <Format kFormat, bool kRounds, int R>
KTS_INLINE void add_tile(const PackedMatrix& w, int64_t panel, int64_t k_tile, int half, const bf16_t* a,
                         __m512 (&even)[R], __m512 (&odd)[R]) {
  if constexpr (kFormat == Format::kBf16) {
    const uint8_t* from = w.panel(panel) + k_tile * kStepBytes + half * kTileBytes;
#pragma GCC unroll 1  // unrolled, broadcasts of one half would be kept for the other and push sums out of the registers
    for (int pair = 0; pair < kTileK / 2; pair += 2, a += 4, from += 128) {
      __builtin_prefetch(from + kPrefetchBytes);
      __builtin_prefetch(from + kPrefetchBytes + 64);
      add_pairs(even, a, _mm512_loadu_si512(from));
      add_pairs(odd, a + 2, _mm512_loadu_si512(from + 64));
    }
  } else {
    constexpr int64_t kBytes = kFormat == Format::kInt8 ? kTileBytes : kTileBytesInt4;
    const uint8_t* from = avx512::quantised_rows<kFormat>(w, panel, k_tile) + half * kBytes;
    // In the order of memory: two blocks of 32 k share the bytes (int4), or the tiles (int8).
    StreamAhead ahead(avx512::quantised_rows<kFormat>(w, panel, k_tile / 2 * 2) + kPrefetchBytes +
                          (k_tile % 2 * 2 + half) * kTileBytes / 2,
                      0);
    __m512 scale = Vec::zero();
    if constexpr (kFormat == Format::kInt4)
      scale = Vec::load_bf16(avx512::group_scales(w, panel, k_tile) + half * kTileN);
#pragma GCC unroll 1
    for (int row = 0; row < 8; ++row, a += 4, from += 64) {
      if (kFormat == Format::kInt8 || k_tile % 2 == 0) ahead.step<1, 1>();
      __m512i low, high;
      if constexpr (kFormat == Format::kInt8) {
        avx512::pairs_of_int8(from, &low, &high);
      } else {
        if (k_tile % 2 == 0)
          avx512::pairs_of_int4<false, kRounds>(from, scale, &low, &high);
        else
          avx512::pairs_of_int4<true, kRounds>(from, scale, &low, &high);
      }
      add_pairs(even, a, low);
      add_pairs(odd, a + 2, high);
    }
  }
}

template <Format kFormat, bool kRounds, int R>
void gemv_rows(const GemmTask& task) {
  const PackedMatrix& w = *task.w;
  const int64_t k_tiles = w.k_panels();
  bf16_t* a = static_cast<bf16_t*>(task.scratch);
  for (int64_t t0 = 0; t0 < k_tiles; t0 += kGemvSteps) {
    const int64_t steps = min_i64(kGemvSteps, k_tiles - t0), k0 = t0 * kTileK;
    gather(task.a_rows, R, task.a_offset + k0, w.k - k0, steps, nullptr, a, kGemvStride);
    for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
      GemvSums<R> sums;
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) sums.even[0][i] = sums.even[1][i] = sums.odd[0][i] = sums.odd[1][i] = Vec::zero();
      for (int64_t t = 0; t < steps; ++t) {
        add_tile<kFormat, kRounds, R>(w, panel, t0 + t, 0, a + t * kTileK, sums.even[0], sums.odd[0]);
        add_tile<kFormat, kRounds, R>(w, panel, t0 + t, 1, a + t * kTileK, sums.even[1], sums.odd[1]);
      }
      float* c = task.c + (panel - task.panel_begin) * kPanel;
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          float* to = c + i * task.ldc + half * 16;
          const __m512 sum = Vec::add(sums.even[half][i], sums.odd[half][i]);
          Vec::store(to, task.accumulate || t0 > 0 ? Vec::add(Vec::load(to), sum) : sum);
        }
      if (kFormat == Format::kInt8 && t0 + steps == k_tiles)
        scale_columns(w.int8_scales() + panel * kPanel, R, c, task.ldc);
    }
  }
}

template <Format kFormat, bool kRounds = false>
void gemv(const GemmTask& task) {
  KTS_DCHECKED(check_task(task, {kFormat, Rows::kBf16, Direction::kForward, kGemvRows}));
  with_rows<kGemvRows>(task.m, [&]<int R>() { gemv_rows<kFormat, kRounds, R>(task); });
}

}  // namespace

void gemm_bf16_bf16_f32_12x32_avx512bf16(const GemmTask& task) { forward<Format::kBf16>(task); }
void gemm_bf16_s8_f32_12x32_avx512bf16(const GemmTask& task) { forward<Format::kInt8>(task); }
void gemm_bf16_s4_f32_12x32_avx512bf16(const GemmTask& task) { forward<Format::kInt4>(task); }
void gemv_bf16_bf16_f32_4x32_avx512bf16(const GemmTask& task) { gemv<Format::kBf16>(task); }
void gemv_bf16_s8_f32_4x32_avx512bf16(const GemmTask& task) { gemv<Format::kInt8>(task); }
void gemv_bf16_s4_f32_4x32_avx512bf16(const GemmTask& task) {
  KTS_DCHECK(task.w != nullptr);
  task.w->format.any_scale ? gemv<Format::kInt4, true>(task) : gemv<Format::kInt4>(task);
}
void dgrad_bf16_bf16_f32_12x32_avx512bf16(const GemmTask& task) { input_grad<Format::kBf16>(task); }
void dgrad_bf16_s8_f32_12x32_avx512bf16(const GemmTask& task) { input_grad<Format::kInt8>(task); }
void dgrad_bf16_s4_f32_12x32_avx512bf16(const GemmTask& task) { input_grad<Format::kInt4>(task); }

}  // namespace kts::avx512bf16
