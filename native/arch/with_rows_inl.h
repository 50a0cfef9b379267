#pragma once
#include <cstdint>

#include "kts/base.h"

namespace kts {

// Calls fn<rows>() with rows, 1 <= rows <= MR, as a compile-time constant.
template <int MR, class Fn>
KTS_INLINE void with_rows(int64_t rows, Fn&& fn) {
  KTS_DCHECK(rows >= 1 && rows <= MR);
  if constexpr (MR == 1) {
    fn.template operator()<1>();
  } else if (rows == MR) {
    fn.template operator()<MR>();
  } else {
    with_rows<MR - 1>(rows, fn);
  }
}

}  // namespace kts
