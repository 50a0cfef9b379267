// c (+)= a W^T with bf16 rows on CPUs without bf16 instructions: a and W become f32 on the way, sums are f32 fused
// multiply-adds in ascending order of k, from c on. Written once on Vec (W = 8 or 16) and on the reader of a weight
// format (weights_inl.h). Include only from gemm_<format>_<isa>.cc.
//
// Rows of a are widened in blocks of at most kMaxBlockM rows x kReduceBlock, kAStride floats apart, so that every row is at a
// constant displacement from one pointer. The micro-kernels hold rows x vectors of sums in registers.
//   micro_packed   weights from the packed bytes straight into the multiply-adds: few row blocks, and GEMV
//   micro_widened  weights widened once per task and kReduceBlock into a scratch in L2: many row blocks
// Both do the same operations in the same order, so a row's result does not depend on how many rows there are.
#pragma once
#include "kts/kernel.h"
#include "weights_inl.h"
#include "with_rows_inl.h"

namespace kts {

constexpr int64_t kReduceBlock = 256;            // elements of the sum that one pass over the accumulators takes
constexpr int64_t kAStride = kReduceBlock + 16;  // floats; off a power of two, so rows do not share cache sets
constexpr int64_t kMaxBlockM = 12;
constexpr int64_t kWidenedFloats = kMaxTaskPanels * kReduceBlock * kPanel;
static_assert((kMaxBlockM * kAStride + kWidenedFloats) * 4 <= kGemmScratchBytes);

// GEMV takes longer pieces, so that weights stream panel by panel.
constexpr int64_t kGemvBlock = 2048;
constexpr int64_t kGemvStride = kGemvBlock + 16;
constexpr int kFewRows = 4;  // GEMV: memory decides, weights are read once and in order

// scales: null, or one factor per element, and the product is rounded to bf16; unit: a power of two, exact but for
// products below 2^-102.
template <class V, int64_t kStride = kAStride>
KTS_INLINE void widen_rows(const bf16_t* const* a_rows, int64_t rows, int64_t begin, int64_t count, float* a,
                           const float* scales = nullptr, float unit = 1.0f) {
  const auto scaled = [&](typename V::F v, int64_t t) {
    return scales == nullptr ? v : V::mul(V::mul(v, V::load(scales + t)), V::set1(unit));
  };
  const int64_t padded = align_up(count, kTileK);
  KTS_DCHECK(rows >= 1 && count >= 1 && padded <= kStride);
  for (int64_t i = 0; i < rows; ++i) {
    const bf16_t* from = a_rows[i] + begin;
    float* to = a + i * kStride;
    int64_t t = 0;
    for (; t + V::W <= count; t += V::W) V::store(to + t, scaled(V::load_bf16(from + t), t));
    if (t < count) {
      V::store(to + t, scaled(V::load_bf16_n(from + t, count - t), t));
      t += V::W;
    }
    for (; t < padded; t += V::W) V::store(to + t, V::zero());
  }
}

// Rows of the next block of at most `most` when `left` are left: blocks of nearly equal height, since small ones cannot
// hide the latency of their multiply-adds.
KTS_INLINE int64_t block_rows(int64_t left, int64_t most) {
  KTS_DCHECK(left >= 1 && most >= 1);
  return ceil_div(left, ceil_div(left, most));
}

// Two vectors of a panel of 32 columns.
template <class V>
struct Step {
  static constexpr int kCols = 2 * V::W;            // 32 or 16
  static constexpr int kPerPanel = kPanel / kCols;  // 1 or 2
};

// sum[i][v] += x[i] * (one phase of dwords[v]).
template <class V, class Weights, int64_t kStride, int MR, int NV, class Scale>
KTS_INLINE void add_phase(const float* x, const typename V::I (&dwords)[NV], const Scale (&scale)[NV], int phase,
                          typename V::F (&sum)[MR][NV]) {
  typename V::F w[NV];
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) w[v] = Weights::weight(dwords[v], scale[v], phase);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    const typename V::F xi = V::set1(x[i * kStride]);
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) sum[i][v] = V::fma(xi, w[v], sum[i][v]);
  }
}

// MR rows x NV vectors of columns that begin with tile `tile` of a panel; `blocks` blocks of 32 k from kb.
// Not inlined: the sums would spill among the callers' variables.
template <class V, class Weights, int MR, int NV, int64_t kStride = kAStride, class Ahead>
[[gnu::noinline]] void micro_packed(const Weights& weights, const float* a, int64_t panel, int64_t tile, int64_t kb,
                                    int64_t blocks, float* c, int64_t ldc, bool accumulate, Ahead& shared_ahead) {
  using F = typename V::F;
  constexpr int kPerPanel = kPanel / V::W, kPanels = NV > kPerPanel ? NV / kPerPanel : 1;
  constexpr int kHere = NV / kPanels;            // vectors per panel
  constexpr int kLines = kHere * V::W / kTileN;  // of 64 bytes, per panel and row of dwords
  Ahead ahead = shared_ahead;                    // in registers
  F sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) sum[i][v] = accumulate ? V::load(c + i * ldc + v * V::W) : V::zero();
  for (int64_t b = kb; b < kb + blocks; ++b) {
    const float* x = a + (b - kb) * kTileK;
    typename Weights::Block block[kPanels];
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) block[p] = weights.block(panel + p, tile, b);
    decltype(block[0].scale(0)) scale[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) scale[v] = block[v / kHere].scale(v % kHere);
    const bool asks = Weights::kHalves == 1 || (b & 1) == 0 || !Ahead::kOncePerLine;
    if (Weights::kExtraLines > 0 && asks) ahead.template step<kPanels, kLines * Weights::kExtraLines>();
#pragma GCC unroll 1
    for (int j = 0; j < Weights::kRows; ++j) {
      if constexpr (Weights::kParts > 1)
        if (j == Weights::kRows / Weights::kParts)
#pragma GCC unroll 16
          for (int v = 0; v < NV; ++v) scale[v] = block[v / kHere].scale(v % kHere, 1);
      if (asks && j % Weights::kRowsPerLine == 0) ahead.template step<kPanels, kLines>();
      typename Weights::I dwords[NV];
      if constexpr (MR == 1) {  // one vector at a time, so that all sums stay in registers
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) {
          const typename Weights::I all = block[v / kHere].dwords(v % kHere, j);
#pragma GCC unroll 4
          for (int f = 0; f < Weights::kPerDword; ++f)
            sum[0][v] = V::fma(V::set1(x[f]), Weights::weight(all, scale[v], f), sum[0][v]);
        }
      } else if constexpr (Weights::kPerDword == 1) {
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) dwords[v] = block[v / kHere].dwords(v % kHere, j);
        add_phase<V, Weights, kStride, MR, NV>(x, dwords, scale, 0, sum);
      } else if constexpr (Weights::kPerDword == 2) {
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) dwords[v] = block[v / kHere].dwords(v % kHere, j);
        add_phase<V, Weights, kStride, MR, NV>(x, dwords, scale, 0, sum);
        add_phase<V, Weights, kStride, MR, NV>(x + 1, dwords, scale, 1, sum);
      } else {
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) dwords[v] = block[v / kHere].dwords(v % kHere, j);
#pragma GCC unroll 1  // unrolled, broadcasts of one phase move into another and push sums out of the registers
        for (int f = 0; f < 4; ++f) add_phase<V, Weights, kStride, MR, NV>(x + f, dwords, scale, f, sum);
      }
      x += Weights::kPerDword;
    }
  }
  shared_ahead = ahead;
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) V::store(c + i * ldc + v * V::W, sum[i][v]);
}

// w: f32 [count][2 W].
template <class V, int MR>
[[gnu::noinline]] void micro_widened(const float* a, const float* w, int64_t count, float* c, int64_t ldc,
                                     bool accumulate, RegionAhead& shared_ahead) {
  using F = typename V::F;
  RegionAhead ahead = shared_ahead;  // in registers
  F sum0[MR], sum1[MR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    sum0[i] = accumulate ? V::load(c + i * ldc) : V::zero();
    sum1[i] = accumulate ? V::load(c + i * ldc + V::W) : V::zero();
  }
  for (int64_t t = 0; t < count; ++t) {
    ahead.step();
    const F w0 = V::load(w), w1 = V::load(w + V::W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const F x = V::set1(a[i * kAStride]);
      sum0[i] = V::fma(x, w0, sum0[i]);
      sum1[i] = V::fma(x, w1, sum1[i]);
    }
    w += 2 * V::W;
    ++a;
  }
  shared_ahead = ahead;
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    V::store(c + i * ldc, sum0[i]);
    V::store(c + i * ldc + V::W, sum1[i]);
  }
}

// Where step s of panel p lies in the scratch of widened weights.
template <class V>
KTS_INLINE int64_t widened_at(int64_t p, int s) {
  return (p * Step<V>::kPerPanel + s) * kReduceBlock * Step<V>::kCols;
}

// `blocks` blocks of one panel -> w[step][k][2 W].
template <class V, class Weights>
[[gnu::noinline]] void widen_panel(const Weights& weights, int64_t panel, int64_t kb, int64_t blocks, float* w) {
  constexpr int64_t kCols = Step<V>::kCols;
  for (int64_t b = 0; b < blocks; ++b) {
    const auto block = weights.block(panel, 0, kb + b);
#pragma GCC unroll 4
    for (int v = 0; v < kPanel / V::W; ++v) {
      auto scale = block.scale(v);
      float* to = w + (v / 2 * kReduceBlock + b * kTileK) * kCols + v % 2 * V::W;
      for (int j = 0; j < Weights::kRows; ++j) {
        if (Weights::kParts > 1 && j == Weights::kRows / Weights::kParts) scale = block.scale(v, 1);
        const auto dwords = block.dwords(v, j);
#pragma GCC unroll 4
        for (int f = 0; f < Weights::kPerDword; ++f)
          V::store(to + (Weights::kPerDword * j + f) * kCols, Weights::weight(dwords, scale, f));
      }
    }
  }
}

// int8: finished sums, in units of `unit`, times the scales of their columns.
template <class V, class Weights>
KTS_INLINE void scale_columns(const GemmTask& task, float unit = Weights::kUnit) {
  if constexpr (Weights::kFormat == Format::kInt8) {
    const float* scales = task.w->int8_scales() + task.panel_begin * kPanel;
    for (int64_t j = 0; j < (task.panel_end - task.panel_begin) * kPanel; j += V::W) {
      const typename V::F scale = V::mul(V::load(scales + j), V::set1(unit));
      for (int64_t i = 0; i < task.m; ++i) {
        float* c = task.c + i * task.ldc + j;
        V::store(c, V::mul(V::load(c), scale));
      }
    }
  }
}

// From this many row blocks on it pays to widen the weights once instead of in the registers of every block. Measured on
// AVX2 (Zen 3), where shifts and masks of bf16 find free ports beside the multiply-adds; the AVX-512 values allow for a
// wider block and for two ports that do everything.
template <class V, class Weights>
constexpr int64_t widen_blocks() {
  if (Weights::kFormat == Format::kBf16 || Weights::kFormat == Format::kF16) return V::W == 16 ? 5 : INT64_MAX / 64;
  if (Weights::kFormat == Format::kInt8) return V::W == 16 ? 3 : 5;
  return 2;
}

template <class V, class Weights, int MR>
void gemm_float_forward(const GemmTask& task) {
  KTS_DCHECKED(check_task(task, {Weights::kFormat, Rows::kBf16, Direction::kForward}));
  const Weights weights(*task.w);
  const int64_t panels = task.panel_end - task.panel_begin, row_blocks = ceil_div(task.m, MR);
  const bool widens = row_blocks >= widen_blocks<V, Weights>();
  float* a = static_cast<float*>(task.scratch);
  float* w = a + kMaxBlockM * kAStride;
  for (int64_t k0 = 0; k0 < task.w->k; k0 += kReduceBlock) {
    const int64_t count = min_i64(kReduceBlock, task.w->k - k0), blocks = ceil_div(count, kTileK), kb = k0 / kTileK;
    const int64_t next_blocks = min_i64(kReduceBlock / kTileK, task.w->k_panels() - kb - blocks);
    const bool accumulate = task.accumulate || k0 > 0;
    RegionAhead ahead(weights.block(task.panel_begin, 0, kb + blocks).rows, panels, next_blocks * weights.block_bytes(),
                      weights.panel_bytes(),
                      row_blocks * panels * Step<V>::kPerPanel * blocks * (widens ? kTileK : Weights::kRows));
    for (int64_t p = 0; widens && p < panels; ++p)
      widen_panel<V>(weights, task.panel_begin + p, kb, blocks, w + widened_at<V>(p, 0));
    for (int64_t i = 0, rows; i < task.m; i += rows) {
      rows = block_rows(task.m - i, MR);
      widen_rows<V>(task.a_rows + i, rows, task.a_offset + k0, count, a);
      for (int64_t p = 0; p < panels; ++p)
        for (int s = 0; s < Step<V>::kPerPanel; ++s) {
          float* c = task.c + i * task.ldc + p * kPanel + s * Step<V>::kCols;
          with_rows<MR>(rows, [&]<int R>() {
            if (widens)
              micro_widened<V, R>(a, w + widened_at<V>(p, s), blocks * kTileK, c, task.ldc, accumulate, ahead);
            else
              micro_packed<V, Weights, R, 2>(weights, a, task.panel_begin + p, s, kb, blocks, c, task.ldc, accumulate,
                                             ahead);
          });
        }
    }
  }
  scale_columns<V, Weights>(task);
}

// Vectors of columns at once, so that about 8 chains of multiply-adds hide each other's latency; int4 has as many scales
// to hold as sums, block types twice as many, and enough to do between two multiply-adds of one chain.
template <class V, class Weights, int R>
constexpr int gemv_vectors() {
  if (R > 2 || (is_block_format(Weights::kFormat) && V::W == 8)) return 2;
  if (is_block_format(Weights::kFormat)) return 4;
  return R == 2 || (Weights::kFormat == Format::kInt4 && V::W == 8) ? 4 : 8;
}

// The rows of one panel, and of the kPanels - 1 panels that follow, kb counted in blocks of 32 k. Where the registers hold
// less than a panel, its tiles take turns every few blocks, which memory does not notice.
template <class V, class Weights, int R, int NV>
KTS_INLINE void gemv_panel(const Weights& weights, const float* a, int64_t panel, int64_t kb, int64_t blocks, float* c,
                           int64_t ldc, bool accumulate) {
  constexpr int kPerPanel = kPanel / V::W, kSteps = NV < kPerPanel ? kPerPanel / NV : 1;
  constexpr int64_t kTurn = kSteps > 1 ? 4 : kGemvBlock / kTileK;
  for (int64_t b = 0; b < blocks; b += kTurn) {
    const int64_t here = min_i64(kTurn, blocks - b);
    for (int s = 0; s < kSteps; ++s) {
      StreamAhead ahead(weights.block(panel, 0, kb + b).rows + s * here * weights.block_bytes() / kSteps +
                            (kSteps > 1 ? 2 : 1) * kPrefetchBytes,
                        weights.panel_bytes());
      micro_packed<V, Weights, R, NV, kGemvStride>(weights, a + b * kTileK, panel, s * NV * V::W / kTileN, kb + b, here,
                                                   c + s * NV * V::W, ldc, accumulate || b > 0, ahead);
    }
  }
}

template <class V, class Weights, int R>
void gemv_rows(const GemmTask& task) {
  constexpr int NV = gemv_vectors<V, Weights, R>(), kPerPanel = kPanel / V::W;
  constexpr int64_t kPanels = NV > kPerPanel ? NV / kPerPanel : 1;
  const Weights weights(*task.w);
  float* a = static_cast<float*>(task.scratch);
  for (int64_t k0 = 0; k0 < task.w->k; k0 += kGemvBlock) {
    const int64_t count = min_i64(kGemvBlock, task.w->k - k0), blocks = ceil_div(count, kTileK), kb = k0 / kTileK;
    const bool accumulate = task.accumulate || k0 > 0;
    widen_rows<V, kGemvStride>(task.a_rows, R, task.a_offset + k0, count, a);
    int64_t p = task.panel_begin;
    float* c = task.c;
    for (; p + kPanels <= task.panel_end; p += kPanels, c += kPanels * kPanel)
      gemv_panel<V, Weights, R, NV>(weights, a, p, kb, blocks, c, task.ldc, accumulate);
    for (; p < task.panel_end; ++p, c += kPanel)
      gemv_panel<V, Weights, R, min_i64(NV, kPerPanel)>(weights, a, p, kb, blocks, c, task.ldc, accumulate);
  }
  scale_columns<V, Weights>(task);
}

// Up to kFewRows rows.
template <class V, class Weights>
void gemv_float_forward(const GemmTask& task) {
  KTS_DCHECKED(check_task(task, {Weights::kFormat, Rows::kBf16, Direction::kForward, kFewRows}));
  with_rows<kFewRows>(task.m, [&]<int R>() { gemv_rows<V, Weights, R>(task); });
}

}  // namespace kts
