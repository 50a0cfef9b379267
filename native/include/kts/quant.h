// From bf16 weights to integers. Rounding is to nearest, ties to even.
#pragma once
#include <cstdint>

#include "kts/types.h"

namespace kts {

// int8, symmetric per output channel: scale = max |w| / 127, q = round(w / scale), so |q| <= 127. Returns the scale;
// 0 for a row of zeros. A NaN or infinity in the row throws std::invalid_argument.
float quantize_row_int8(const bf16_t* w, int64_t count, int8_t* q);

// int4, symmetric per group: q = clamp(round(w / scale), -8, 7). The scale, of either sign, is the candidate of least
// squared error (quant/int4.cc says which are tried), a bf16 number of at most 5 significant bits, so that q * scale is
// exact in bf16. Returns the scale; 0 for a group of zeros. A NaN or infinity throws std::invalid_argument.
float quantize_group_int4(const bf16_t* w, int64_t count, int8_t* q);

}  // namespace kts
