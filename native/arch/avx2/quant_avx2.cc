// Weight quantisers of the avx2 level; the code is in quantize_inl.h.
#include "../quantize_inl.h"
#include "../vec_avx2.h"

namespace kts::avx2 {
constinit const QuantOps kQuantOps = make_quant_ops<Vec, Vec>(kAvx2);
}  // namespace kts::avx2
