// Symmetric int8 per output channel: the rule is int8_scale of kts/quant.h.
#include "kts/base.h"
#include "kts/quant.h"

namespace kts {

float quantize_row_int8(const bf16_t* w, int64_t count, int8_t* q) {
  const QuantOps& ops = quant_ops(active_isa());
  const uint32_t largest = ops.largest(w, count);
  KTS_CHECK(largest < 0x7f80u, "weights: expected finite numbers, found NaN or infinity");
  const Int8Scale scale = int8_scale(largest);
  ops.round_int8(w, count, scale.inverse, q);
  return scale.scale;
}

const QuantOps& quant_ops(IsaSet isa) { return isa & kAvx2 ? avx2::kQuantOps : scalar::kQuantOps; }

}  // namespace kts
