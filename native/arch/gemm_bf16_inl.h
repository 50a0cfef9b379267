// bf16 x packed bf16 -> f32 on CPUs without bf16 instructions, written once on Vec (W = 8 or 16).
// Include only from gemm_bf16_<isa>.cc.
//
// Operands a are widened to f32 in blocks of kBlockM rows x kReduceBlock (rows kAStride floats apart, so that every row
// is at a constant displacement from one pointer). The micro-kernels hold rows x 2 vectors of sums in registers.
//
// Forward: a dword of a tile is the pair (k even, k odd) of one n; shift and mask give two vectors of W n each. With
// few row blocks the weights go from the packed bytes straight into the multiply-adds, with many they are widened once.
//
// Input gradient: tiles are transposed as dwords into [n][even k | odd k]; in registers for few rows, else into a
// scratch in L2 that serves all rows of the task. Even and odd columns are interleaved when sums go to c.
#pragma once
#include "kts/gemm.h"

namespace kts {

constexpr int64_t kReduceBlock = 256;            // elements of the sum that one pass over the accumulators takes
constexpr int64_t kAStride = kReduceBlock + 16;  // floats; off a power of two, so rows do not share cache sets
constexpr int64_t kMaxBlockM = 12;
static_assert((kMaxBlockM * kAStride + kMaxTaskPanels * kReduceBlock * kPanel) * 4 <= kGemmScratchBytes);

// Weights are asked for this far ahead along a panel: the hardware's streams stop at page ends.
constexpr int64_t kPrefetchElements = 4 * kTileElements;

template <class V>
KTS_INLINE void widen_rows(const bf16_t* const* a_rows, int64_t rows, int64_t begin, int64_t count, float* a) {
  const int64_t padded = align_up(count, kTileK);
  for (int64_t i = 0; i < rows; ++i) {
    const bf16_t* from = a_rows[i] + begin;
    float* to = a + i * kAStride;
    int64_t t = 0;
    for (; t + V::W <= count; t += V::W) V::store(to + t, V::load_bf16(from + t));
    if (t < count) {
      V::store(to + t, V::load_bf16_n(from + t, count - t));
      t += V::W;
    }
    for (; t < padded; t += V::W) V::store(to + t, V::zero());
  }
}

// A tile of 16 n is 16 / W vectors wide; a micro-kernel column step covers two vectors of a panel of 32.
template <class V>
struct Step {
  static constexpr int kCols = 2 * V::W;            // 32 or 16
  static constexpr int kPerPanel = kPanel / kCols;  // 1 or 2
  // bf16 elements from the panel's k tile to vector v of step s
  KTS_INLINE constexpr int64_t forward_offset(int s, int v) {
    return V::W == 16 ? v * kTileElements : s * kTileElements + v * 2 * V::W;
  }
};

// kCold: the tiles come from memory, not from the caches. Inlined, the sums would spill among its callers' variables.
template <class V, int MR, bool kCold>
[[gnu::noinline]] void micro_forward(const float* a, const bf16_t* tiles, int step, int64_t k_tiles, float* c,
                                     int64_t ldc, bool accumulate) {
  using F = typename V::F;
  F sum0[MR], sum1[MR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    sum0[i] = accumulate ? V::load(c + i * ldc) : V::zero();
    sum1[i] = accumulate ? V::load(c + i * ldc + V::W) : V::zero();
  }
  const bf16_t* left = tiles + Step<V>::forward_offset(step, 0);
  const bf16_t* right = tiles + Step<V>::forward_offset(step, 1);
  for (int64_t kt = 0; kt < k_tiles; ++kt) {
    for (int pair = 0; pair < kTileK / 2; ++pair) {
      if constexpr (kCold) {
        __builtin_prefetch(left + kPrefetchElements);
        if constexpr (V::W == 16) __builtin_prefetch(right + kPrefetchElements);
      }
      const auto left_pairs = V::load_pairs(left);
      const auto right_pairs = V::load_pairs(right);
      left += 2 * kTileN;
      right += 2 * kTileN;
      {
        const F w0 = V::even(left_pairs), w1 = V::even(right_pairs);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
          const F x = V::set1(a[i * kAStride]);
          sum0[i] = V::fma(x, w0, sum0[i]);
          sum1[i] = V::fma(x, w1, sum1[i]);
        }
      }
      {
        const F w0 = V::odd(left_pairs), w1 = V::odd(right_pairs);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
          const F x = V::set1(a[i * kAStride + 1]);
          sum0[i] = V::fma(x, w0, sum0[i]);
          sum1[i] = V::fma(x, w1, sum1[i]);
        }
      }
      a += 2;
    }
    left += kTileElements;  // the panel's other tile
    right += kTileElements;
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    V::store(c + i * ldc, sum0[i]);
    V::store(c + i * ldc + V::W, sum1[i]);
  }
}

// w: f32 [count][2 W] with row stride kPanel. Sums go on from c.
template <class V, int MR>
void micro_widened(const float* a, const float* w, int64_t count, float* c, int64_t ldc, bool accumulate) {
  using F = typename V::F;
  F sum0[MR], sum1[MR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    sum0[i] = accumulate ? V::load(c + i * ldc) : V::zero();
    sum1[i] = accumulate ? V::load(c + i * ldc + V::W) : V::zero();
  }
  for (int64_t t = 0; t < count; ++t) {
    const F w0 = V::load(w), w1 = V::load(w + V::W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const F x = V::set1(a[i * kAStride]);
      sum0[i] = V::fma(x, w0, sum0[i]);
      sum1[i] = V::fma(x, w1, sum1[i]);
    }
    w += kPanel;
    ++a;
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    V::store(c + i * ldc, sum0[i]);
    V::store(c + i * ldc + V::W, sum1[i]);
  }
}

// w: f32 [count][2 W] with row stride kPanel: even columns, then odd columns.
template <class V, int MR>
void micro_input_grad(const float* a, const float* w, int64_t count, float* c, int64_t ldc, bool accumulate) {
  using F = typename V::F;
  F even[MR], odd[MR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) even[i] = odd[i] = V::zero();
  for (int64_t t = 0; t < count; ++t) {
    const F w0 = V::load(w), w1 = V::load(w + V::W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const F x = V::set1(a[i * kAStride]);
      even[i] = V::fma(x, w0, even[i]);
      odd[i] = V::fma(x, w1, odd[i]);
    }
    w += kPanel;
    ++a;
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    F low, high;
    V::interleave(even[i], odd[i], &low, &high);
    if (accumulate) {
      low = V::add(V::load(c + i * ldc), low);
      high = V::add(V::load(c + i * ldc + V::W), high);
    }
    V::store(c + i * ldc, low);
    V::store(c + i * ldc + V::W, high);
  }
}

// Calls fn<rows>() with rows, 1 <= rows <= MR, as a compile-time constant.
template <int MR, class Fn>
KTS_INLINE void with_rows(int64_t rows, Fn&& fn) {
  if constexpr (MR == 1) {
    fn.template operator()<1>();
  } else {
    if (rows == MR) {
      fn.template operator()<MR>();
    } else {
      with_rows<MR - 1>(rows, fn);
    }
  }
}

// Tile -> w[k][16 n] for its 32 k, row stride kPanel.
template <class V>
KTS_INLINE void widen_tile(const bf16_t* tile, float* w) {
  for (int pair = 0; pair < kTileK / 2; ++pair)
    for (int n = 0; n < kTileN; n += V::W) {
      const auto pairs = V::load_pairs(tile + pair * 2 * kTileN + 2 * n);
      V::store(w + 2 * pair * kPanel + n, V::even(pairs));
      V::store(w + (2 * pair + 1) * kPanel + n, V::odd(pairs));
    }
}

KTS_INLINE void prefetch_tile(const bf16_t* tile) {
  for (int i = 0; i < kTileElements; i += 32) __builtin_prefetch(tile + i);
}

// From this many row blocks on it pays to widen the weights once instead of in the registers of every block. Measured
// on AVX2; the AVX-512 value allows for its wider block.
template <class V>
constexpr int64_t kWidenBlocks = V::W == 16 ? 5 : 3;

template <class V, int MR>
void gemm_bf16_forward(const GemmTask& task) {
  const int64_t k_tiles = task.w->k_panels(), panels = task.panel_end - task.panel_begin;
  const bf16_t* packed = static_cast<const bf16_t*>(task.w->data);
  const bool widens = task.m > (kWidenBlocks<V> - 1) * MR;
  float* a = static_cast<float*>(task.scratch);
  float* w = a + kMaxBlockM * kAStride;  // [panels][kReduceBlock][kPanel]
  for (int64_t k0 = 0; k0 < task.w->k; k0 += kReduceBlock) {
    const int64_t count = min_i64(kReduceBlock, task.w->k - k0), tiles = ceil_div(count, kTileK);
    const bool accumulate = task.accumulate || k0 > 0;
    const auto panel_tiles = [&](int64_t p) {
      return packed + ((task.panel_begin + p) * k_tiles + k0 / kTileK) * 2 * kTileElements;
    };
    if (widens)
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t t = 0; t < 2 * tiles; ++t) {
          const bf16_t* tile = panel_tiles(p) + t * kTileElements;
          prefetch_tile(tile + kPrefetchElements);
          widen_tile<V>(tile, w + (p * kReduceBlock + t / 2 * kTileK) * kPanel + t % 2 * kTileN);
        }
    for (int64_t i = 0; i < task.m; i += MR) {
      const int64_t rows = min_i64(MR, task.m - i);
      widen_rows<V>(task.a_rows + i, rows, task.a_offset + k0, count, a);
      for (int64_t p = 0; p < panels; ++p)
        for (int s = 0; s < Step<V>::kPerPanel; ++s) {
          float* c = task.c + i * task.ldc + p * kPanel + s * Step<V>::kCols;
          with_rows<MR>(rows, [&]<int R>() {
            if (widens)
              micro_widened<V, R>(a, w + p * kReduceBlock * kPanel + s * Step<V>::kCols, tiles * kTileK, c, task.ldc,
                                  accumulate);
            else if (i == 0)
              micro_forward<V, R, true>(a, panel_tiles(p), s, tiles, c, task.ldc, accumulate);
            else
              micro_forward<V, R, false>(a, panel_tiles(p), s, tiles, c, task.ldc, accumulate);
          });
        }
    }
  }
}

// Tile (n block, k panel) -> w[n][s * 2 W + ...] for its 16 n.
template <class V>
KTS_INLINE void transpose_tile(const bf16_t* tile, float* w) {
  for (int s = 0; s < Step<V>::kPerPanel; ++s)
    for (int n0 = 0; n0 < kTileN; n0 += V::W) {
      typename V::I rows[V::W];
      for (int i = 0; i < V::W; ++i) rows[i] = V::load_pairs(tile + (s * V::W + i) * 2 * kTileN + n0 * 2);
      V::transpose(rows);
      for (int i = 0; i < V::W; ++i) {
        float* to = w + (n0 + i) * kPanel + s * Step<V>::kCols;
        V::store(to, V::even(rows[i]));
        V::store(to + V::W, V::odd(rows[i]));
      }
    }
}

// One tile of an input gradient of few rows: transposed in registers, W n at a time, and used at once.
// part: sums of row i at part + i * kMaxTaskPanels * kPanel, even and odd columns apart as in w above.
template <class V, int MR>
KTS_INLINE void add_tile_input_grad(const bf16_t* tile, const float* a, float* part) {
  using F = typename V::F;
  constexpr int64_t kStride = kMaxTaskPanels * kPanel;
  for (int s = 0; s < Step<V>::kPerPanel; ++s) {
    F even[MR], odd[MR];
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
      even[i] = V::load(part + i * kStride + s * Step<V>::kCols);
      odd[i] = V::load(part + i * kStride + s * Step<V>::kCols + V::W);
    }
    for (int n0 = 0; n0 < kTileN; n0 += V::W) {
      typename V::I rows[V::W];
#pragma GCC unroll 16
      for (int j = 0; j < V::W; ++j) rows[j] = V::load_pairs(tile + (s * V::W + j) * 2 * kTileN + n0 * 2);
      V::transpose(rows);
#pragma GCC unroll 16
      for (int j = 0; j < V::W; ++j) {
        const F w0 = V::even(rows[j]), w1 = V::odd(rows[j]);
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i) {
          const F x = V::set1(a[i * kAStride + n0 + j]);
          even[i] = V::fma(x, w0, even[i]);
          odd[i] = V::fma(x, w1, odd[i]);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
      V::store(part + i * kStride + s * Step<V>::kCols, even[i]);
      V::store(part + i * kStride + s * Step<V>::kCols + V::W, odd[i]);
    }
  }
}

// Up to kFewRows rows: memory decides, so weights are read once, in order, without the way through scratch.
constexpr int kFewRows = 4;

template <class V, int MR>
void input_grad_few_rows(const GemmTask& task) {
  constexpr int64_t kStride = kMaxTaskPanels * kPanel;
  const int64_t k_tiles = task.w->k_panels(), panels = task.panel_end - task.panel_begin;
  const bf16_t* packed = static_cast<const bf16_t*>(task.w->data) + task.panel_begin * 2 * kTileElements;
  float* a = static_cast<float*>(task.scratch);
  float* part = a + kMaxBlockM * kAStride;
  for (int64_t n0 = 0; n0 < task.w->n; n0 += kReduceBlock) {
    const int64_t count = min_i64(kReduceBlock, task.w->n - n0);
    widen_rows<V>(task.a_rows, MR, task.a_offset + n0, count, a);
    for (int64_t j = 0; j < MR * kStride; j += V::W) V::store(part + j, V::zero());
    for (int64_t n = 0; n < count; n += kPanel) {
      const bf16_t* tiles = packed + (n0 + n) / kPanel * k_tiles * 2 * kTileElements;
      const bf16_t* ahead = tiles + k_tiles * 2 * kTileElements;
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t half = 0; half < 2; ++half) {
          prefetch_tile(ahead + (2 * p + half) * kTileElements);
          add_tile_input_grad<V, MR>(tiles + (2 * p + half) * kTileElements, a + n + half * kTileN, part + p * kPanel);
        }
    }
    const bool accumulate = task.accumulate || n0 > 0;
    for (int i = 0; i < MR; ++i)
      for (int64_t j = 0; j < panels * kPanel; j += Step<V>::kCols) {
        typename V::F low, high;
        V::interleave(V::load(part + i * kStride + j), V::load(part + i * kStride + j + V::W), &low, &high);
        float* c = task.c + i * task.ldc + j;
        if (accumulate) {
          low = V::add(V::load(c), low);
          high = V::add(V::load(c + V::W), high);
        }
        V::store(c, low);
        V::store(c + V::W, high);
      }
  }
}

template <class V, int MR>
void gemm_bf16_input_grad(const GemmTask& task) {
  if (task.m <= kFewRows) {
    with_rows<kFewRows>(task.m, [&]<int R>() { input_grad_few_rows<V, R>(task); });
    return;
  }
  const int64_t k_tiles = task.w->k_panels(), panels = task.panel_end - task.panel_begin;
  const bf16_t* packed = static_cast<const bf16_t*>(task.w->data) + task.panel_begin * 2 * kTileElements;
  float* a = static_cast<float*>(task.scratch);
  float* w = a + kMaxBlockM * kAStride;
  for (int64_t n0 = 0; n0 < task.w->n; n0 += kReduceBlock) {
    const int64_t count = min_i64(kReduceBlock, task.w->n - n0);
    const bool accumulate = task.accumulate || n0 > 0;
    for (int64_t n = 0; n < count; n += kPanel) {
      const bf16_t* tiles = packed + (n0 + n) / kPanel * k_tiles * 2 * kTileElements;
      const bf16_t* ahead = tiles + 2 * k_tiles * 2 * kTileElements;
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t half = 0; half < 2; ++half) {
          prefetch_tile(ahead + (2 * p + half) * kTileElements);
          transpose_tile<V>(tiles + (2 * p + half) * kTileElements,
                            w + (p * kReduceBlock + n + half * kTileN) * kPanel);
        }
    }
    for (int64_t i = 0; i < task.m; i += MR) {
      const int64_t rows = min_i64(MR, task.m - i);
      widen_rows<V>(task.a_rows + i, rows, task.a_offset + n0, count, a);
      for (int64_t p = 0; p < panels; ++p)
        for (int s = 0; s < Step<V>::kPerPanel; ++s) {
          const float* from = w + p * kReduceBlock * kPanel + s * Step<V>::kCols;
          float* c = task.c + i * task.ldc + p * kPanel + s * Step<V>::kCols;
          with_rows<MR>(rows, [&]<int R>() { micro_input_grad<V, R>(a, from, count, c, task.ldc, accumulate); });
        }
    }
  }
}

}  // namespace kts
