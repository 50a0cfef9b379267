// Row operations of the avx512 level; the code is in elementwise_inl.h.
#include "elementwise_inl.h"
#include "vec_avx512.h"

namespace kts::avx512 {
constinit const RowOps kRowOps = make_row_ops<Vec>(kAvx512);
}  // namespace kts::avx512
