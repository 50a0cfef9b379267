// Row operations of the avx2 level; the code is in elementwise_inl.h.
#include "elementwise_inl.h"
#include "vec_avx2.h"

namespace kts::avx2 {
constinit const RowOps kRowOps = make_row_ops<Vec>(kAvx2);
}  // namespace kts::avx2
