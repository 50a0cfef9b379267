// Block types of GGUF files (layouts: ggml's ggml-common.h, ggml-quants.c) as these kernels hold them: the integers and
// scales of the file, nothing rounded, in tiles as kts/packed.h says.
//
// W[n, k] = factor * code + offset, for the codes of `bits` bits and the scales of a group of `group` consecutive k:
//   one level     factor = d,           offset = m                  d, m f16 per group (or d a power of two, e8m0)
//   two levels    factor = d * scale,   offset = -(dmin * min)      d, dmin f16 per 256 k; scale, min int8 per group
// code: table[stored] for types of 4 bits, stored - bias for others.
#pragma once
#include <cstdint>

#include "kts/base.h"

namespace kts {

enum class BlockType : int {
  kNone = -1,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ4_K,
  kQ5_K,
  kQ6_K,
  kIq4Nl,
  kIq4Xs,
  kMxfp4,
};

struct BlockTypeInfo {
  const char* name;  // of the GGUF type, in lower case
  int bits;          // 4, 5, 6 or 8, of a stored code
  int block;         // k of a block
  int block_bytes;   // in the file
  int group;         // k that share a factor
  bool has_offset;   // m or min
  bool two_levels;
  bool is_e8m0;      // d is 2^(byte - 128), of codes that are twice the value
  int bias;          // of 5, 6 and 8 bits
  int8_t table[16];  // of 4 bits
};

inline constexpr BlockTypeInfo kBlockTypes[] = {
    {"q4_0", 4, 32, 18, 32, false, false, false, 0, {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7}},
    {"q4_1", 4, 32, 20, 32, true, false, false, 0, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}},
    {"q5_0", 5, 32, 22, 32, false, false, false, 16, {}},
    {"q5_1", 5, 32, 24, 32, true, false, false, 0, {}},
    {"q8_0", 8, 32, 34, 32, false, false, false, 0, {}},
    {"q4_k", 4, 256, 144, 32, true, true, false, 0, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}},
    {"q5_k", 5, 256, 176, 32, true, true, false, 0, {}},
    {"q6_k", 6, 256, 210, 16, false, true, false, 32, {}},
    {"iq4_nl",
     4,
     32,
     18,
     32,
     false,
     false,
     false,
     0,
     {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}},
    {"iq4_xs",
     4,
     256,
     136,
     32,
     false,
     true,
     false,
     0,
     {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}},
    {"mxfp4", 4, 32, 17, 32, false, false, true, 0, {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}},
};
inline constexpr int kNumBlockTypes = sizeof(kBlockTypes) / sizeof(kBlockTypes[0]);

KTS_INLINE constexpr const BlockTypeInfo& block_type_info(BlockType type) {
  return kBlockTypes[static_cast<int>(type)];
}

// kNone for an unknown name.
BlockType block_type_from_name(const char* name);

// One block.
struct DecodedBlock {
  uint16_t d = 0, dmin = 0;  // f16; dmin: m of one level; e8m0: d is the byte
  int8_t scales[16] = {};    // two levels, per group
  int8_t mins[16] = {};
  uint8_t stored[256];  // codes as stored, 0 .. 2^bits - 1; 8 bits: two's complement
};

// bytes: one block of the type.
void decode_block(BlockType type, const uint8_t* bytes, DecodedBlock* block);

// The code: looked up, or with its bias subtracted.
KTS_INLINE constexpr int code_value(const BlockTypeInfo& type, uint8_t stored) {
  if (type.bits == 4) return type.table[stored];
  return type.bits == 8 ? static_cast<int8_t>(stored) : stored - type.bias;
}

// Factor and offset of the codes of a group.
struct BlockScale {
  float factor, offset;
};
// d, dmin as in DecodedBlock; scale and min are read for types of two levels.
BlockScale block_scale(const BlockTypeInfo& type, uint16_t d, uint16_t dmin, int8_t scale, int8_t min);

}  // namespace kts
