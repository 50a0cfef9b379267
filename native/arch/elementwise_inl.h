// Row operations written once on Vec (arch/vec_*.h) and instantiated per ISA. Include only from elementwise_<isa>.cc.
#pragma once
#include "kts/elementwise.h"
#include "quantize_inl.h"

namespace kts {

// exp(x), about 1 ulp over the finite range: x = n ln 2 + r, |r| <= ln 2 / 2; the degree-6 polynomial for exp(r) is
// Cephes' expf (S. L. Moshier, netlib.org/cephes). NaN passes through because min and max return their second operand
// then.
template <class V>
KTS_INLINE typename V::F exp_f32(typename V::F x) {
  using F = typename V::F;
  const F clamped = V::max(V::set1(-87.0f), V::min(V::set1(88.0f), x));
  const F n = V::round_even(V::mul(clamped, V::set1(1.44269504088896341f)));
  F r = V::fma(n, V::set1(-0.693359375f), clamped);
  r = V::fma(n, V::set1(2.12194440e-4f), r);
  F p = V::set1(1.9875691500e-4f);
  p = V::fma(p, r, V::set1(1.3981999507e-3f));
  p = V::fma(p, r, V::set1(8.3334519073e-3f));
  p = V::fma(p, r, V::set1(4.1665795894e-2f));
  p = V::fma(p, r, V::set1(1.6666665459e-1f));
  p = V::fma(p, r, V::set1(5.0000001201e-1f));
  p = V::fma(V::mul(r, r), p, V::add(r, V::set1(1.0f)));
  return V::mul(p, V::pow2(n));
}

// value = g sigmoid(g); slope = sigmoid(g) (1 + g (1 - sigmoid(g)))
template <class V>
struct Silu {
  KTS_INLINE typename V::F sigmoid(typename V::F g) {
    return V::div(V::set1(1.0f), V::add(V::set1(1.0f), exp_f32<V>(V::sub(V::zero(), g))));
  }
  KTS_INLINE typename V::F value(typename V::F g) { return V::mul(g, sigmoid(g)); }
  KTS_INLINE void value_and_slope(typename V::F g, typename V::F* value, typename V::F* slope) {
    const auto s = sigmoid(g);
    *value = V::mul(g, s);
    *slope = V::mul(s, V::fma(g, V::sub(V::set1(1.0f), s), V::set1(1.0f)));
  }
};

template <class V, template <class> class Act>
void glu_forward(const float* g_sum, const float* u_sum, int64_t cols, f16_t* g_out, f16_t* u_out, bf16_t* h_out) {
  for (int64_t j = 0; j < cols; j += V::W) {
    const int64_t n = cols - j;
    const bool whole = n >= V::W;
    const auto g = whole ? V::load(g_sum + j) : V::load_n(g_sum + j, n);
    const auto u = whole ? V::load(u_sum + j) : V::load_n(u_sum + j, n);
    const auto h = V::mul(Act<V>::value(g), u);
    if (whole) {
      if (g_out != nullptr) {
        V::store_f16(g_out + j, g);
        V::store_f16(u_out + j, u);
      }
      V::store_bf16(h_out + j, h);
    } else {
      if (g_out != nullptr) {
        V::store_f16_n(g_out + j, n, g);
        V::store_f16_n(u_out + j, n, u);
      }
      V::store_bf16_n(h_out + j, n, h);
    }
  }
}

template <class V, template <class> class Act>
float glu_backward(const f16_t* g_in, const f16_t* u_in, const float* dh_in, float weight, int64_t cols, bf16_t* dg_out,
                   bf16_t* du_out, bf16_t* h_out) {
  auto dot = V::zero();
  const auto scale = V::set1(weight);
  for (int64_t j = 0; j < cols; j += V::W) {
    const int64_t n = cols - j;
    const bool whole = n >= V::W;
    const auto g = whole ? V::load_f16(g_in + j) : V::load_f16_n(g_in + j, n);
    const auto u = whole ? V::load_f16(u_in + j) : V::load_f16_n(u_in + j, n);
    const auto dh_unweighted = whole ? V::load(dh_in + j) : V::load_n(dh_in + j, n);
    typename V::F value, slope;
    Act<V>::value_and_slope(g, &value, &slope);
    const auto h = V::mul(value, u);
    dot = V::fma(dh_unweighted, h, dot);
    const auto dh = V::mul(dh_unweighted, scale);
    const auto dg = V::mul(V::mul(dh, u), slope);
    const auto du = V::mul(dh, value);
    if (whole) {
      V::store_bf16(h_out + j, h);
      V::store_bf16(dg_out + j, dg);
      V::store_bf16(du_out + j, du);
    } else {
      V::store_bf16_n(h_out + j, n, h);
      V::store_bf16_n(dg_out + j, n, dg);
      V::store_bf16_n(du_out + j, n, du);
    }
  }
  return V::sum(dot);
}

template <class V>
void scale_add(float scale, const float* src, int64_t cols, float* dst) {
  const auto s = V::set1(scale);
  int64_t j = 0;
  for (; j + V::W <= cols; j += V::W) V::store(dst + j, V::fma(s, V::load(src + j), V::load(dst + j)));
  if (j < cols) V::store_n(dst + j, cols - j, V::fma(s, V::load_n(src + j, cols - j), V::load_n(dst + j, cols - j)));
}

template <class V>
void to_bf16(const float* src, int64_t cols, bf16_t* dst) {
  int64_t j = 0;
  for (; j + V::W <= cols; j += V::W) V::store_bf16(dst + j, V::load(src + j));
  if (j < cols) V::store_bf16_n(dst + j, cols - j, V::load_n(src + j, cols - j));
}

template <class V, int MI, int NJ>
KTS_INLINE void dot_block(const bf16_t* const* a_rows, const float* b, int64_t b_stride, int64_t k, float* c,
                          int64_t ldc, bool accumulate) {
  typename V::F sum[MI][NJ];
  for (int i = 0; i < MI; ++i)
    for (int j = 0; j < NJ; ++j) sum[i][j] = V::zero();
  int64_t t = 0;
  for (; t + V::W <= k; t += V::W) {
    typename V::F bt[NJ];
    for (int j = 0; j < NJ; ++j) bt[j] = V::load(b + j * b_stride + t);
    for (int i = 0; i < MI; ++i) {
      const auto at = V::load_bf16(a_rows[i] + t);
      for (int j = 0; j < NJ; ++j) sum[i][j] = V::fma(at, bt[j], sum[i][j]);
    }
  }
  if (t < k) {
    typename V::F bt[NJ];
    for (int j = 0; j < NJ; ++j) bt[j] = V::load_n(b + j * b_stride + t, k - t);
    for (int i = 0; i < MI; ++i) {
      const auto at = V::load_bf16_n(a_rows[i] + t, k - t);
      for (int j = 0; j < NJ; ++j) sum[i][j] = V::fma(at, bt[j], sum[i][j]);
    }
  }
  for (int i = 0; i < MI; ++i)
    for (int j = 0; j < NJ; ++j) {
      float* to = c + i * ldc + j;
      *to = (accumulate ? *to : 0.0f) + V::sum(sum[i][j]);
    }
}

// Blocks of 4 x 4 sums on wide registers files, 2 x 4 on sixteen registers. The lanes of one sum do not depend on the
// block.
template <class V>
void dot_rows(const bf16_t* const* a_rows, int64_t m, const float* b, int64_t b_stride, int64_t n, int64_t k, float* c,
              int64_t ldc, bool accumulate) {
  constexpr int kMi = V::W >= 16 ? 4 : 2;
  int64_t i = 0;
  for (; i + kMi <= m; i += kMi) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4)
      dot_block<V, kMi, 4>(a_rows + i, b + j * b_stride, b_stride, k, c + i * ldc + j, ldc, accumulate);
    for (; j < n; ++j)
      dot_block<V, kMi, 1>(a_rows + i, b + j * b_stride, b_stride, k, c + i * ldc + j, ldc, accumulate);
  }
  for (; i < m; ++i) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4)
      dot_block<V, 1, 4>(a_rows + i, b + j * b_stride, b_stride, k, c + i * ldc + j, ldc, accumulate);
    for (; j < n; ++j) dot_block<V, 1, 1>(a_rows + i, b + j * b_stride, b_stride, k, c + i * ldc + j, ldc, accumulate);
  }
}

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

// Q: bf16_t or float.
template <class V, class Q, int MI, int NJ>
KTS_INLINE void axpy_block(const float* l, int64_t l_row, int64_t l_term, const Q* const* q_rows, int64_t q_offset,
                           int64_t terms, float* c, int64_t ldc) {
  typename V::F sum[MI][NJ];
  for (int i = 0; i < MI; ++i)
    for (int j = 0; j < NJ; ++j) sum[i][j] = V::load(c + i * ldc + j * V::W);
  for (int64_t t = 0; t < terms; ++t) {
    typename V::F q[NJ];
    for (int j = 0; j < NJ; ++j) q[j] = load_wide<V>(q_rows[t] + q_offset + j * V::W);
    for (int i = 0; i < MI; ++i) {
      const auto left = V::set1(l[i * l_row + t * l_term]);
      for (int j = 0; j < NJ; ++j) sum[i][j] = V::fma(left, q[j], sum[i][j]);
    }
  }
  for (int i = 0; i < MI; ++i)
    for (int j = 0; j < NJ; ++j) V::store(c + i * ldc + j * V::W, sum[i][j]);
}

template <class V, class Q>
void axpy_tail(const float* l, int64_t l_row, int64_t l_term, int64_t rows, const Q* const* q_rows, int64_t q_offset,
               int64_t terms, float* c, int64_t ldc, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    auto sum = V::load_n(c + i * ldc, cols);
    for (int64_t t = 0; t < terms; ++t)
      sum = V::fma(V::set1(l[i * l_row + t * l_term]), load_wide_n<V>(q_rows[t] + q_offset, cols), sum);
    V::store_n(c + i * ldc, cols, sum);
  }
}

template <class V, class Q>
void axpy_rows(const float* l, int64_t l_row, int64_t l_term, int64_t rows, const Q* const* q_rows, int64_t q_offset,
               int64_t terms, float* c, int64_t ldc, int64_t cols) {
  constexpr int kNj = V::W >= 16 ? 4 : 2;
  int64_t j = 0;
  for (; j + kNj * V::W <= cols; j += kNj * V::W) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4)
      axpy_block<V, Q, 4, kNj>(l + i * l_row, l_row, l_term, q_rows, q_offset + j, terms, c + i * ldc + j, ldc);
    for (; i < rows; ++i)
      axpy_block<V, Q, 1, kNj>(l + i * l_row, l_row, l_term, q_rows, q_offset + j, terms, c + i * ldc + j, ldc);
  }
  for (; j + V::W <= cols; j += V::W)
    for (int64_t i = 0; i < rows; ++i)
      axpy_block<V, Q, 1, 1>(l + i * l_row, l_row, l_term, q_rows, q_offset + j, terms, c + i * ldc + j, ldc);
  if (j < cols) axpy_tail<V, Q>(l, l_row, l_term, rows, q_rows, q_offset + j, terms, c + j, ldc, cols - j);
}

// Hash of (row key, column). The first three lines are a bijective 32-bit mixer (constants: C. Wellons,
// "hash-prospector"), the last one brings in the second half of the row's key. moe/dropout.h and kt_sft/ops/dropout.py
// say the same.
template <class V>
KTS_INLINE typename V::I dropout_hash(RowMask mask, int64_t col) {
  auto h = V::xor_i(V::add_i(V::iota(), V::set1_i(static_cast<uint32_t>(col))), V::set1_i(mask.key0));
  h = V::mul_i(V::xor_i(h, V::template srl_i<16>(h)), V::set1_i(0x7feb352du));
  h = V::mul_i(V::xor_i(h, V::template srl_i<15>(h)), V::set1_i(0x846ca68bu));
  h = V::xor_i(h, V::template srl_i<16>(h));
  return V::mul_i(V::xor_i(h, V::set1_i(mask.key1)), V::set1_i(0x9e3779b1u));
}

template <class V>
void mask_bf16(RowMask mask, int64_t col_begin, const bf16_t* src, int64_t cols, bf16_t* dst) {
  int64_t j = 0;
  for (; j + V::W <= cols; j += V::W)
    V::store_bf16(dst + j, V::keep(dropout_hash<V>(mask, col_begin + j), mask.threshold, V::load_bf16(src + j)));
  if (j < cols)
    V::store_bf16_n(dst + j, cols - j,
                    V::keep(dropout_hash<V>(mask, col_begin + j), mask.threshold, V::load_bf16_n(src + j, cols - j)));
}

template <class V>
void masked_add(RowMask mask, int64_t col_begin, const float* src, int64_t cols, float* dst) {
  int64_t j = 0;
  for (; j + V::W <= cols; j += V::W)
    V::store(dst + j,
             V::add(V::load(dst + j), V::keep(dropout_hash<V>(mask, col_begin + j), mask.threshold, V::load(src + j))));
  if (j < cols)
    V::store_n(dst + j, cols - j,
               V::add(V::load_n(dst + j, cols - j),
                      V::keep(dropout_hash<V>(mask, col_begin + j), mask.threshold, V::load_n(src + j, cols - j))));
}

template <class V>
constexpr RowOps make_row_ops(Isa isa) {
  return RowOps{isa,
                {{glu_forward<V, Silu>, glu_backward<V, Silu>}},
                scale_add<V>,
                to_bf16<V>,
                dot_rows<V>,
                axpy_rows<V, float>,
                axpy_rows<V, bf16_t>,
                quantize_row<V>,
                mask_bf16<V>,
                masked_add<V>};
}

}  // namespace kts
