// Row operations written once on Vec (arch/vec_*.h) and instantiated per ISA. Include only from elementwise_<isa>.cc.
#pragma once
#include "gates_inl.h"
#include "kts/elementwise.h"
#include "lora_rows_inl.h"
#include "quantize_inl.h"

namespace kts {

template <class V, template <class> class Gate>
void glu_forward(const GateParams& params, const float* g_sum, const float* u_sum, int64_t cols, f16_t* g_out,
                 f16_t* u_out, bf16_t* h_out) {
  KTS_DCHECK(is_array(g_sum, cols) && is_array(u_sum, cols) && is_array(h_out, cols));
  KTS_DCHECK((g_out == nullptr) == (u_out == nullptr) && is_aligned(g_out, 2) && is_aligned(u_out, 2));
  const GateParams p = params;
  for (int64_t j = 0; j < cols; j += V::W) {
    const int64_t n = cols - j;
    const bool whole = n >= V::W;
    auto g = whole ? V::load(g_sum + j) : V::load_n(g_sum + j, n);
    auto u = whole ? V::load(u_sum + j) : V::load_n(u_sum + j, n);
    const auto h = Gate<V>::forward(p, g, u);
    Gate<V>::for_tape(p, &g, &u);
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

template <class V, template <class> class Gate>
float glu_backward(const GateParams& params, const f16_t* g_in, const f16_t* u_in, const float* dh_in, float weight,
                   int64_t cols, bf16_t* dg_out, bf16_t* du_out, bf16_t* h_out) {
  KTS_DCHECK(is_array(g_in, cols) && is_array(u_in, cols) && is_array(dh_in, cols));
  KTS_DCHECK(is_array(dg_out, cols) && is_array(du_out, cols) && is_array(h_out, cols));
  const GateParams p = params;
  auto dot = V::zero();
  const auto scale = V::set1(weight);
  for (int64_t j = 0; j < cols; j += V::W) {
    const int64_t n = cols - j;
    const bool whole = n >= V::W;
    const auto g = whole ? V::load_f16(g_in + j) : V::load_f16_n(g_in + j, n);
    const auto u = whole ? V::load_f16(u_in + j) : V::load_f16_n(u_in + j, n);
    const auto dh_unweighted = whole ? V::load(dh_in + j) : V::load_n(dh_in + j, n);
    typename V::F h, dg, du;
    Gate<V>::backward(p, g, u, V::mul(dh_unweighted, scale), &h, &dg, &du);
    dot = V::fma(dh_unweighted, h, dot);
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
  KTS_DCHECK(is_array(src, cols) && is_array(dst, cols));
  const auto s = V::set1(scale);
  int64_t j = 0;
  for (; j + V::W <= cols; j += V::W) V::store(dst + j, V::fma(s, V::load(src + j), V::load(dst + j)));
  if (j < cols) V::store_n(dst + j, cols - j, V::fma(s, V::load_n(src + j, cols - j), V::load_n(dst + j, cols - j)));
}

template <class V>
void to_bf16(const float* src, int64_t cols, bf16_t* dst) {
  KTS_DCHECK(is_array(src, cols) && is_array(dst, cols));
  int64_t j = 0;
  for (; j + V::W <= cols; j += V::W) V::store_bf16(dst + j, V::load(src + j));
  if (j < cols) V::store_bf16_n(dst + j, cols - j, V::load_n(src + j, cols - j));
}

KTS_INLINE bool is_mask(RowMask mask) { return mask.threshold >= 0 && mask.threshold <= 1 << 24; }

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
  KTS_DCHECK(is_mask(mask) && col_begin >= 0 && is_array(src, cols) && is_array(dst, cols));
  int64_t j = 0;
  for (; j + V::W <= cols; j += V::W)
    V::store_bf16(dst + j, V::keep(dropout_hash<V>(mask, col_begin + j), mask.threshold, V::load_bf16(src + j)));
  if (j < cols)
    V::store_bf16_n(dst + j, cols - j,
                    V::keep(dropout_hash<V>(mask, col_begin + j), mask.threshold, V::load_bf16_n(src + j, cols - j)));
}

template <class V>
void masked_add(RowMask mask, int64_t col_begin, const float* src, int64_t cols, float* dst) {
  KTS_DCHECK(is_mask(mask) && col_begin >= 0 && is_array(src, cols) && is_array(dst, cols));
  int64_t j = 0;
  for (; j + V::W <= cols; j += V::W)
    V::store(dst + j,
             V::add(V::load(dst + j), V::keep(dropout_hash<V>(mask, col_begin + j), mask.threshold, V::load(src + j))));
  if (j < cols)
    V::store_n(dst + j, cols - j,
               V::add(V::load_n(dst + j, cols - j),
                      V::keep(dropout_hash<V>(mask, col_begin + j), mask.threshold, V::load_n(src + j, cols - j))));
}

template <class V, template <class> class Gate>
constexpr GluOps glu_ops() {
  return {glu_forward<V, Gate>, glu_backward<V, Gate>};
}

template <class V>
constexpr RowOps make_row_ops(Isa isa) {
  return RowOps{isa,
                // in the order of Activation
                {glu_ops<V, SiluGlu>(), glu_ops<V, GeluGlu>(), glu_ops<V, GeluTanhGlu>(), glu_ops<V, ReluGlu>(),
                 glu_ops<V, ClampedSwiglu>()},
                scale_add<V>,
                to_bf16<V>,
                dot_rows<V>,
                axpy_rows<V, float>,
                axpy_rows<V, bf16_t>,
                transpose<V>,
                quantize_row<V>,
                mask_bf16<V>,
                masked_add<V>};
}

}  // namespace kts
