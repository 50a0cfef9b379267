// Weights to integers. int8, symmetric per output channel: the rule is int8_scale of kts/quant.h.
//
// int4, symmetric per group. The scale is searched: with L the largest magnitude of the group, all magnitudes of 5
// significant bits in [3/32 L, 5/32 L], about 12, with both signs (-8 .. 7 reaches further to one side), and the least
// sum of squared errors in f32 wins. 3/32 clips a quarter of L at -8, 5/32 exceeds L / 7 by 9 %: a wider range does not
// lower the error of groups of 32, 64 or 128 by 0.1 %, for Gaussian, Laplace or Student-t weights.
// Groups of weights below 7 * 2^-126 have the scale 2^-126; no scale is denormal. Code in arch/quantize_inl.h.
#include <cstring>

#include "kts/pack.h"
#include "kts/tables.h"

namespace kts {

float quantize_row_int8(const bf16_t* w, int64_t count, int8_t* q) {
  KTS_DCHECK(is_array(w, count) && is_array(q, count));
  const QuantOps& ops = quant_ops(active_isa());
  const uint32_t largest = ops.largest(w, count);
  KTS_CHECK(largest < 0x7f80u, "weights: expected finite numbers, found NaN or infinity");
  const Int8Scale scale = int8_scale(largest);
  ops.round_int8(w, count, scale.inverse, q);
  return scale.scale;
}

float quantize_group_int4(const bf16_t* w, int64_t count, int8_t* q) {
  KTS_DCHECK(is_array(w, count) && is_array(q, count));
  KTS_CHECK(count <= 128, "int4: expected groups of at most 128");
  const QuantOps& ops = quant_ops(active_isa());
  const uint32_t largest = ops.largest(w, count);
  KTS_CHECK(largest < 0x7f80u, "weights: expected finite numbers, found NaN or infinity");
  if (largest != 0) return ops.int4(w, count, largest, q);
  std::memset(q, 0, static_cast<size_t>(count));
  return 0.0f;
}

}  // namespace kts
