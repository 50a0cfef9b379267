// Instruction set levels known to the kernel tables.
#pragma once
#include <cstdint>

namespace kts {

enum Isa : uint32_t {
  kScalar = 1u << 0,  // plain C++: the reference of the tests, too slow for work
  kAvx2 = 1u << 1,    // AVX2 + FMA + F16C
  kAvx512 = 1u << 2,  // AVX-512 F, BW, DQ, VL
  kAvx512Vnni = 1u << 3,
  kAvx512Bf16 = 1u << 4,
  kAmxBf16 = 1u << 5,  // AMX-TILE + AMX-BF16, granted by the operating system
  kAmxInt8 = 1u << 6,
};
using IsaSet = uint32_t;

}  // namespace kts
