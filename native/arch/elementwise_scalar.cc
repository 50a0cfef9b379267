// Row operations of the scalar level; the code is in elementwise_inl.h.
#include "elementwise_inl.h"
#include "vec_scalar.h"

namespace kts::scalar {
constinit const RowOps kRowOps = make_row_ops<Vec>(kScalar);
}  // namespace kts::scalar
