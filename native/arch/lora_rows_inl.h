// LoRA's thin products and layout changes, written once on Vec (arch/vec_*.h). Included by elementwise_inl.h.
// Every sum has lanes and an order of terms of its own: results do not depend on the blocks, only on W.
#pragma once
#include "kts/elementwise.h"
#include "kts/kernel.h"
#include "with_rows_inl.h"

namespace kts {

// --- c[i, j] = sum_k a_i[k] b_j[k]: both operands along k ---

constexpr int kDotCols = 6;           // rows of b at a time: with 2 rows of a, 12 sums + 2 + 1 of 16 registers
constexpr int64_t kDotDepth = 512;    // terms at a time: 12 KiB of b stay in the first-level cache for all rows of a
constexpr int64_t kPrefetchRows = 8;  // with fewer rows of a, b streams through
constexpr int64_t kDotRowsMax = 64;   // rows of a whose sums wait for the next terms

template <class V, int MI, int NJ>
KTS_INLINE void dot_block(const bf16_t* const* a_rows, const float* b, int64_t b_stride, int64_t begin, int64_t end,
                          typename V::F (&sum)[MI][NJ]) {
  int64_t t = begin;
  for (; t + V::W <= end; t += V::W) {
    typename V::F at[MI];
    for (int i = 0; i < MI; ++i) at[i] = V::load_bf16(a_rows[i] + t);
    for (int j = 0; j < NJ; ++j) {
      auto bt = V::load(b + j * b_stride + t);
      asm("" : "+v"(bt));  // one load: GCC would make it a memory operand of every product
      for (int i = 0; i < MI; ++i) sum[i][j] = V::fma(at[i], bt, sum[i][j]);
    }
  }
  if (t == end) return;
  for (int j = 0; j < NJ; ++j) {
    const auto bt = V::load_n(b + j * b_stride + t, end - t);
    for (int i = 0; i < MI; ++i) sum[i][j] = V::fma(V::load_bf16_n(a_rows[i] + t, end - t), bt, sum[i][j]);
  }
}

// Terms [begin, end) of MI x NJ sums; `lanes` [MI][kDotCols][W] keeps them between blocks of terms.
template <class V, int MI, int NJ>
KTS_INLINE void dot_part(const bf16_t* const* a_rows, const float* b, int64_t b_stride, int64_t begin, int64_t end,
                         bool last, float* lanes, float* c, int64_t ldc, bool accumulate) {
  typename V::F sum[MI][NJ];
  for (int i = 0; i < MI; ++i)
    for (int j = 0; j < NJ; ++j) sum[i][j] = begin == 0 ? V::zero() : V::load(lanes + (i * kDotCols + j) * V::W);
  dot_block<V, MI, NJ>(a_rows, b, b_stride, begin, end, sum);
  for (int i = 0; i < MI; ++i)
    for (int j = 0; j < NJ; ++j) {
      if (last)
        c[i * ldc + j] = (accumulate ? c[i * ldc + j] : 0.0f) + V::sum(sum[i][j]);
      else
        V::store(lanes + (i * kDotCols + j) * V::W, sum[i][j]);
    }
}

// Part `step` of `steps` of the kDotDepth columns of NJ rows: spread over the products that come before their use.
template <int NJ>
KTS_INLINE void prefetch_rows(const float* b, int64_t b_stride, int64_t step, int64_t steps) {
  for (int64_t t = kDotDepth * step / steps & -16; t < kDotDepth * (step + 1) / steps; t += 16)
    for (int j = 0; j < NJ; ++j) __builtin_prefetch(b + j * b_stride + t, 0, 2);
}

// m <= kDotRowsMax rows of a, NJ rows of b.
template <class V, int NJ>
void dot_columns(const bf16_t* const* a_rows, int64_t m, const float* b, int64_t b_stride, int64_t k, float* c,
                 int64_t ldc, bool accumulate) {
  constexpr int kMi = V::W >= 16 ? 4 : 2;
  alignas(64) float lanes[kDotRowsMax * kDotCols * V::W];
  for (int64_t begin = 0; begin == 0 || begin < k; begin += kDotDepth) {
    const int64_t end = min_i64(begin + kDotDepth, k);
    const float* next = end < k ? b + end : b + NJ * b_stride;
    int64_t i = 0;
    for (; i + kMi <= m; i += kMi) {
      if (m >= kPrefetchRows) prefetch_rows<NJ>(next, b_stride, i / kMi, m / kMi);
      dot_part<V, kMi, NJ>(a_rows + i, b, b_stride, begin, end, end == k, lanes + i * kDotCols * V::W, c + i * ldc, ldc,
                           accumulate);
    }
    for (; i < m; ++i)
      dot_part<V, 1, NJ>(a_rows + i, b, b_stride, begin, end, end == k, lanes + i * kDotCols * V::W, c + i * ldc, ldc,
                         accumulate);
  }
}

template <class V>
void dot_rows(const bf16_t* const* a_rows, int64_t m, const float* b, int64_t b_stride, int64_t n, int64_t k, float* c,
              int64_t ldc, bool accumulate) {
  KTS_DCHECKED(check_rows(a_rows, m));
  KTS_DCHECK(k >= 0 && is_array(b, n) && (n <= 1 || b_stride >= k) && is_array(c, m * n) && (m <= 1 || ldc >= n));
  const int64_t blocks = ceil_div(n, kDotCols);
  for (int64_t i = 0; i < m; i += kDotRowsMax)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t j = n * block / blocks, cols = n * (block + 1) / blocks - j;
      with_rows<kDotCols>(cols, [&]<int NJ>() {
        dot_columns<V, NJ>(a_rows + i, min_i64(kDotRowsMax, m - i), b + j * b_stride, b_stride, k, c + i * ldc + j, ldc,
                           accumulate);
      });
    }
}

// --- c[i, :] = sum_t l[i, t] q_t[:]: coefficients times rows ---

constexpr int kAxpyRows = 6;             // rows of c at a time
constexpr int64_t kPackedBytes = 16384;  // packed q: half of the first-level cache

template <class V>
KTS_INLINE typename V::F load_wide(const float* p) {
  return V::load(p);
}
template <class V>
KTS_INLINE typename V::F load_wide(const bf16_t* p) {
  return V::load_bf16(p);
}
template <class V>
KTS_INLINE typename V::F load_wide_n(const float* p, int64_t n) {
  return V::load_n(p, n);
}
template <class V>
KTS_INLINE typename V::F load_wide_n(const bf16_t* p, int64_t n) {
  return V::load_bf16_n(p, n);
}

// Coefficients l[i * row + t * term].
struct Coefficients {
  const float* values;
  int64_t row, term;
  KTS_INLINE Coefficients at(const Coefficients& l, int64_t i, int64_t t) {
    return {l.values + i * l.row + t * l.term, l.row, l.term};
  }
};

// Columns of q where they are.
template <class V, class Q>
struct RowsInPlace {
  const Q* const* rows;
  int64_t offset;
  typename V::F load(int64_t t, int j) const { return load_wide<V>(rows[t] + offset + j * V::W); }
  void prefetch(int64_t t, int64_t column) const { __builtin_prefetch(rows[t] + offset + column, 0, 2); }
};

// Columns of q side by side, in f32: rows 8 KiB apart would share one set of the cache.
template <class V, int NJ>
struct RowsPacked {
  const float* values;
  typename V::F load(int64_t t, int j) const { return V::load(values + (t * NJ + j) * V::W); }
};

template <class V, class Rows, int MI, int NJ>
KTS_INLINE void axpy_block(const Coefficients& l, const Rows& q, int64_t terms, float* c, int64_t ldc,
                           bool accumulate) {
  typename V::F sum[MI][NJ];
  for (int i = 0; i < MI; ++i)
    for (int j = 0; j < NJ; ++j) sum[i][j] = accumulate ? V::load(c + i * ldc + j * V::W) : V::zero();
  for (int64_t t = 0; t < terms; ++t) {
    typename V::F qt[NJ];
    for (int j = 0; j < NJ; ++j) qt[j] = q.load(t, j);
    for (int i = 0; i < MI; ++i) {
      const auto left = V::set1(l.values[i * l.row + t * l.term]);
      for (int j = 0; j < NJ; ++j) sum[i][j] = V::fma(left, qt[j], sum[i][j]);
    }
  }
  for (int i = 0; i < MI; ++i)
    for (int j = 0; j < NJ; ++j) V::store(c + i * ldc + j * V::W, sum[i][j]);
}

template <class V, class Rows, int NJ>
void axpy_columns(const Coefficients& l, int64_t rows, const Rows& q, int64_t terms, float* c, int64_t ldc,
                  bool accumulate) {
  const int64_t blocks = ceil_div(rows, kAxpyRows);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t i = rows * block / blocks;
    with_rows<kAxpyRows>(rows * (block + 1) / blocks - i, [&]<int R>() {
      axpy_block<V, Rows, R, NJ>(Coefficients::at(l, i, 0), q, terms, c + i * ldc, ldc, accumulate);
    });
  }
}

// NJ vectors of columns, q packed as many terms at a time as the cache holds.
template <class V, class Q, int NJ>
KTS_INLINE void axpy_packed(const Coefficients& l, int64_t rows, const RowsInPlace<V, Q>& q, int64_t terms, float* c,
                            int64_t ldc, bool accumulate) {
  constexpr int64_t kTerms = kPackedBytes / static_cast<int64_t>(NJ * V::W * sizeof(float));
  alignas(64) float packed[kTerms * NJ * V::W];
  for (int64_t begin = 0; begin == 0 || begin < terms; begin += kTerms) {
    const int64_t count = min_i64(kTerms, terms - begin);
    for (int64_t t = 0; t < count; ++t) {
      for (int j = 0; j < NJ; ++j) V::store(packed + (t * NJ + j) * V::W, q.load(begin + t, j));
      q.prefetch(begin + t, NJ * V::W);  // the next columns, while these are computed
    }
    axpy_columns<V, RowsPacked<V, NJ>, NJ>(Coefficients::at(l, 0, begin), rows, {packed}, count, c, ldc,
                                           accumulate || begin > 0);
  }
}

template <class V, class Q>
void axpy_tail(const Coefficients& l, int64_t rows, const Q* const* q_rows, int64_t q_offset, int64_t terms, float* c,
               int64_t ldc, int64_t cols, bool accumulate) {
  for (int64_t i = 0; i < rows; ++i) {
    auto sum = accumulate ? V::load_n(c + i * ldc, cols) : V::zero();
    for (int64_t t = 0; t < terms; ++t)
      sum = V::fma(V::set1(l.values[i * l.row + t * l.term]), load_wide_n<V>(q_rows[t] + q_offset, cols), sum);
    V::store_n(c + i * ldc, cols, sum);
  }
}

// Columns [j, cols) as far as whole steps of NJ vectors go; returns where they end.
template <class V, class Q, int NJ>
KTS_INLINE int64_t axpy_steps(const Coefficients& l, int64_t rows, const RowsInPlace<V, Q>& q_rows, int64_t terms,
                              float* c, int64_t ldc, int64_t j, int64_t cols, bool accumulate) {
  for (; j + NJ * V::W <= cols; j += NJ * V::W) {
    const RowsInPlace<V, Q> q{q_rows.rows, q_rows.offset + j};
    if (rows > kAxpyRows)
      axpy_packed<V, Q, NJ>(l, rows, q, terms, c + j, ldc, accumulate);
    else
      axpy_columns<V, RowsInPlace<V, Q>, NJ>(l, rows, q, terms, c + j, ldc, accumulate);
  }
  return j;
}

template <class V, class Q>
void axpy_rows(const float* l_values, int64_t l_row, int64_t l_term, int64_t rows, const Q* const* q_rows,
               int64_t q_offset, int64_t terms, float* c, int64_t ldc, int64_t cols, bool accumulate) {
  constexpr int kWide = 8;
  KTS_DCHECKED(check_rows(q_rows, terms));
  KTS_DCHECK(is_array(l_values, rows * terms) && l_row >= 0 && l_term >= 0 && q_offset >= 0);
  KTS_DCHECK(is_array(c, rows * cols) && (rows <= 1 || ldc >= cols));
  const Coefficients l{l_values, l_row, l_term};
  const RowsInPlace<V, Q> q{q_rows, q_offset};
  int64_t j = 0;
  if (rows == 1)  // enough sums to hide the latency of their additions
    for (; j + kWide * V::W <= cols; j += kWide * V::W)
      axpy_block<V, RowsInPlace<V, Q>, 1, kWide>(l, {q_rows, q_offset + j}, terms, c + j, ldc, accumulate);
  if constexpr (V::W >= 16) j = axpy_steps<V, Q, 4>(l, rows, q, terms, c, ldc, j, cols, accumulate);
  j = axpy_steps<V, Q, 2>(l, rows, q, terms, c, ldc, j, cols, accumulate);
  j = axpy_steps<V, Q, 1>(l, rows, q, terms, c, ldc, j, cols, accumulate);
  if (j < cols) axpy_tail<V, Q>(l, rows, q_rows, q_offset + j, terms, c + j, ldc, cols - j, accumulate);
}

// --- to[j, i] = from[i, j] ---

constexpr int64_t kLineFloats = 16;

template <class V>
KTS_INLINE void transpose_tile(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  typename V::I tile[V::W];
  for (int i = 0; i < V::W; ++i) tile[i] = V::load_i(from + i * from_stride);
  V::transpose(tile);
  for (int j = 0; j < V::W; ++j) V::store_i(to + j * to_stride, tile[j]);
}

// Whole cache lines of `to` are written at once: where its rows lie a power of two apart, lines do not stay for long.
template <class V>
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t cols, float* to, int64_t to_stride) {
  KTS_DCHECK(rows >= 0 && cols >= 0 && is_array(from, rows * cols) && is_array(to, rows * cols));
  KTS_DCHECK((rows <= 1 || from_stride >= cols) && (cols <= 1 || to_stride >= rows));
  for (int64_t line = 0; line < rows; line += kLineFloats) {
    const int64_t end = min_i64(line + kLineFloats, rows);
    int64_t tiled_rows = line, tiled_cols = 0;
    if constexpr (V::W > 1) {
      tiled_rows = end - (end - line) % V::W, tiled_cols = cols - cols % V::W;
      for (int64_t j = 0; j < tiled_cols; j += V::W)
        for (int64_t i = line; i < tiled_rows; i += V::W)
          transpose_tile<V>(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    }
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t i = j < tiled_cols ? tiled_rows : line; i < end; ++i)
        to[j * to_stride + i] = from[i * from_stride + j];
  }
}

}  // namespace kts
