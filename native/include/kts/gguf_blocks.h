// Blocks of GGUF tensors to numbers, for every type with a defined meaning. The same operations in the same order as
// PyPI's gguf 0.19.0, so results agree bit by bit (NaNs: some NaN). Scales of any value are taken as they are: what is
// not finite in a file is not finite in the result.
#pragma once
#include <cstdint>

#include "kts/types.h"

namespace kts {

// A type of ggml: rows are sequences of blocks of block_elements elements in block_bytes bytes.
struct GgmlType {
  const char* name;  // as ggml writes it: "Q4_K"
  int block_elements;
  int block_bytes;
  void (*decode)(const uint8_t* blocks, int64_t count, float* out);  // count * block_elements numbers
};

inline constexpr int kMaxGgmlBlock = 256;  // elements

// Null: no such type, or none of floating point numbers.
const GgmlType* find_ggml_type(const char* name);

// out [rows, cols] = the rows at `blocks`, stride_bytes apart; cols is a multiple of block_elements, `stride` counts
// elements of out. Runs on the calling thread. bf16 is rounded to nearest even.
void dequantize_gguf(const GgmlType& type, const uint8_t* blocks, int64_t stride_bytes, int64_t rows, int64_t cols,
                     float* out, int64_t stride);
void dequantize_gguf(const GgmlType& type, const uint8_t* blocks, int64_t stride_bytes, int64_t rows, int64_t cols,
                     bf16_t* out, int64_t stride);

}  // namespace kts
