// c = a W^T for few bf16 rows and integer weights, in block floating point: the elements of a row that share a block of
// 32 k become int16 mantissas of one exponent, so that sums within a block are exact int32 and a weight costs half the
// instructions of widening it to f32. Include only from gemm_<format>_<isa>.cc.
//
// An element with at least 2^-7 of the magnitude of its block's largest is exact; a smaller one is rounded to 2^-15 of
// the block's power of two. Blocks are added in f32 in ascending order. A NaN or infinity makes the row's sums NaN.
#pragma once
#include <bit>

#include "gemm_float_inl.h"

namespace kts {

constexpr int64_t kBfpBlock = kTileK;                     // elements that share an exponent
constexpr int64_t kBfpBlocks = kGemvBlock / kBfpBlock;    // of one pass over the sums
constexpr int kBfpShift = 14;                             // mantissas of the largest element: 2^14 .. 2^15
constexpr uint32_t kBfpLeastExponent = 127 - (126 - 14);  // the block's scale 2^(exponent - 14) stays normal
constexpr int64_t kBfpMantissas = kGemvBlock + 32;        // per row; off a power of two

// Rows of a task, kGemvBlock elements each.
struct BfpRows {
  int16_t mantissas[kFewRows][kBfpMantissas];  // in fours: k, k + 2, k + 1, k + 3
  float scales[kFewRows][kBfpBlocks];          // value = mantissa * scale
  int32_t sums[kFewRows][2 * kBfpBlocks];      // of 16 mantissas each

  KTS_MEMBER int32_t block_sum(int row, int64_t b) const { return sums[row][2 * b] + sums[row][2 * b + 1]; }
};
static_assert(sizeof(BfpRows) <= kGemmScratchBytes);

// One block of one row; x: kBfpBlock elements.
template <class V>
KTS_INLINE void to_block_floating_point(const bf16_t* x, int16_t* mantissas, float* scale, int32_t* sums) {
  auto lanes = V::set1_i(0);
  for (int64_t j = 0; j < kBfpBlock; j += 2 * V::W) lanes = V::max_magnitude(lanes, x + j);
  const uint32_t exponent = V::largest_u16(lanes) >> 7;
  const uint32_t used = exponent < kBfpLeastExponent ? kBfpLeastExponent : exponent;
  const auto up = V::as_f(V::set1_i((254 + kBfpShift - used) << 23));  // 2^(kBfpShift - (used - 127))
  for (int64_t half = 0; half < 2; ++half) {
    auto sum = V::set1_i(0);
    for (int64_t j = half * kBfpBlock / 2; j < (half + 1) * kBfpBlock / 2; j += V::W) {
      const auto rounded = V::to_i32(exponent == 255 ? V::zero() : V::mul(V::load_bf16(x + j), up));
      sum = V::add_i(sum, rounded);
      V::store_i16_pairs(mantissas + j, rounded);
    }
    sums[half] = V::sum_i(sum);
  }
  *scale = exponent == 255 ? __builtin_nanf("") : std::bit_cast<float>((used - kBfpShift) << 23);
}

template <class V>
void to_block_floating_point(const bf16_t* x, int64_t count, int row, BfpRows* rows) {
  int64_t b = 0;
  for (; (b + 1) * kBfpBlock <= count; ++b)
    to_block_floating_point<V>(x + b * kBfpBlock, rows->mantissas[row] + b * kBfpBlock, &rows->scales[row][b],
                               &rows->sums[row][2 * b]);
  if (b * kBfpBlock == count) return;
  alignas(64) bf16_t rest[kBfpBlock] = {};
  for (int64_t j = b * kBfpBlock; j < count; ++j) rest[j - b * kBfpBlock] = x[j];
  to_block_floating_point<V>(rest, rows->mantissas[row] + b * kBfpBlock, &rows->scales[row][b],
                             &rows->sums[row][2 * b]);
}

// Two of the four weights of a dword as int16 pairs: k and k + 2 (kOdd: k + 1 and k + 3). int4: q + 8 of one half of every
// byte.
template <class V, class Weights, bool kHigh, bool kOdd>
KTS_INLINE typename V::I weight_pairs(typename V::I dwords) {
  if constexpr (Weights::kFormat == Format::kInt8) {
    return V::template sra_i16<8>(kOdd ? dwords : V::template sll_i16<8>(dwords));
  } else {
    constexpr int kShift = 4 * kHigh + 8 * kOdd;
    const auto shifted = V::template srl_i16<kShift>(dwords);
    return kShift == 12 ? shifted : V::and_i(shifted, V::set1_i(0x000f000fu));
  }
}

// sum += two weights of each dword times the elements of x, MR rows x two vectors.
template <class V, class Weights, int MR, bool kHigh, bool kOdd>
KTS_INLINE void add_pairs(const typename V::I (&dwords)[2], const int16_t* x, typename V::I (&sum)[MR][2]) {
  typename V::I w[2];
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) w[v] = weight_pairs<V, Weights, kHigh, kOdd>(dwords[v]);
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) {
    const auto pair = V::set1_pair(x + i * kBfpMantissas + 2 * kOdd);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) sum[i][v] = V::dot_i16(sum[i][v], w[v], pair);
  }
}

// MR rows x two vectors of columns from tile `tile` of a panel on, one block.
template <class V, class Weights, int MR, bool kHigh>
KTS_INLINE void add_bfp_block(const Weights& weights, const BfpRows& rows, int64_t panel, int64_t tile, int64_t kb,
                              int64_t b, float* c, int64_t ldc, StreamAhead& ahead) {
  using I = typename V::I;
  using T = Tiles<V, Weights::kFormat == Format::kInt4 ? kTileBytesInt4 : kTileBytes>;
  const auto block = weights.block(panel, tile, kb);
  I sum[MR][2];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v)
      sum[i][v] = V::set1_i(Weights::kFormat == Format::kInt4 ? static_cast<uint32_t>(-8 * rows.block_sum(i, b)) : 0);
  const int16_t* x = rows.mantissas[0] + b * kBfpBlock;
#pragma GCC unroll 1
  for (int j = 0; j < Weights::kRows; ++j, x += Weights::kPerDword) {
    if (!kHigh) ahead.step<1, 2 * V::W / kTileN>();
    I dwords[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      dwords[v] = T::load(block.rows, v, j);
    }
    add_pairs<V, Weights, MR, kHigh, false>(dwords, x, sum);
    add_pairs<V, Weights, MR, kHigh, true>(dwords, x, sum);
  }
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    float* to = c + v * V::W;
    if constexpr (Weights::kFormat == Format::kInt4) {
      const auto scale = V::load_bf16(block.scales + v * V::W);
      for (int i = 0; i < MR; ++i)
        V::store(to + i * ldc,
                 V::fma(V::to_f32(sum[i][v]), V::mul(V::set1(rows.scales[i][b]), scale), V::load(to + i * ldc)));
    } else {
      for (int i = 0; i < MR; ++i)
        V::store(to + i * ldc, V::fma(V::to_f32(sum[i][v]), V::set1(rows.scales[i][b]), V::load(to + i * ldc)));
    }
  }
}

// One panel; a tile holds two blocks, which are met in the order of memory. kb is even.
template <class V, class Weights, int MR>
[[gnu::noinline]] void add_bfp_panel(const Weights& weights, const BfpRows& rows, int64_t panel, int64_t kb,
                                     int64_t blocks, float* c, int64_t ldc) {
  StreamAhead ahead(weights.block(panel, 0, kb).rows + kPrefetchBytes, 0);
  for (int64_t b = 0; b < blocks; b += 2)
    for (int s = 0; s < Step<V>::kPerPanel; ++s) {
      float* to = c + s * Step<V>::kCols;
      add_bfp_block<V, Weights, MR, false>(weights, rows, panel, s, kb + b, b, to, ldc, ahead);
      if (b + 1 < blocks)
        add_bfp_block<V, Weights, MR, Weights::kHalves == 2>(weights, rows, panel, s, kb + b + 1, b + 1, to, ldc,
                                                             ahead);
    }
}

// Calls add_panel(weights, rows, panel, first block, blocks, c of the panel) for pieces of at most kGemvBlock elements.
template <class V, class Weights, class AddPanel>
KTS_INLINE void gemv_bfp_rows(const GemmTask& task, AddPanel&& add_panel) {
  const Weights weights(*task.w);
  const int64_t cols = (task.panel_end - task.panel_begin) * kPanel;
  BfpRows& rows = *static_cast<BfpRows*>(task.scratch);
  for (int64_t i = 0; i < task.m; ++i)
    for (int64_t j = 0; j < cols; j += V::W) V::store(task.c + i * task.ldc + j, V::zero());
  for (int64_t k0 = 0; k0 < task.w->k; k0 += kGemvBlock) {
    const int64_t count = min_i64(kGemvBlock, task.w->k - k0), blocks = ceil_div(count, kBfpBlock);
    for (int64_t i = 0; i < task.m; ++i)
      to_block_floating_point<V>(task.a_rows[i] + task.a_offset + k0, count, static_cast<int>(i), &rows);
    for (int64_t p = task.panel_begin; p < task.panel_end; ++p)
      add_panel(weights, rows, p, k0 / kTileK, blocks, task.c + (p - task.panel_begin) * kPanel);
  }
  scale_columns<V, Weights>(task, 1.0f);
}

// Up to kFewRows rows; does not accumulate.
template <class V, class Weights>
void gemv_bfp_forward(const GemmTask& task) {
  KTS_DCHECKED(check_task(task, {Weights::kFormat, Rows::kBfp16, Direction::kForward, kFewRows}));
  with_rows<kFewRows>(task.m, [&]<int R>() {
    gemv_bfp_rows<V, Weights>(
        task, [&](const Weights& weights, const BfpRows& rows, int64_t panel, int64_t kb, int64_t blocks, float* c) {
          add_bfp_panel<V, Weights, R>(weights, rows, panel, kb, blocks, c, task.ldc);
        });
  });
}

}  // namespace kts
