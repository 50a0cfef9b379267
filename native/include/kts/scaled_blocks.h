// Weights of quantised safetensors checkpoints to numbers: a value of few bits times the scale of its block, the product
// in f32, rounded once where the result is bf16. All run on the calling thread.
#pragma once
#include <cstdint>

#include "kts/types.h"

namespace kts {

// What `dequantize_*` writes to: one of the two is set.
struct NumbersOut {
  bf16_t* bf16 = nullptr;
  float* f32 = nullptr;
  int64_t stride = 0;  // elements
};

// e4m3 of the OCP 8-bit formats (torch.float8_e4m3fn): no infinities, 0x7f and 0xff are NaN.
// w [rows, cols], scales [ceil((row_begin + rows) / block_rows), ceil(cols / block_cols)]; row 0 of w is row
// `row_begin` of the tensor that the scales belong to.
struct Fp8Blocks {
  const uint8_t* w;
  int64_t stride;
  const float* scales;
  int64_t scale_stride;
  int64_t block_rows, block_cols;
};
void dequantize_fp8(const Fp8Blocks& from, int64_t row_begin, int64_t rows, int64_t cols, const NumbersOut& out);

// Integers q in -8 .. 7 stored as q + 8, two a byte, the first in the low half (compressed-tensors' pack-quantized
// int32 words are these bytes). w [rows, cols / 2], scales [rows, ceil(cols / group)].
struct Int4Groups {
  const uint8_t* w;
  int64_t stride;
  const float* scales;
  int64_t scale_stride;
  int64_t group;
};
void dequantize_int4(const Int4Groups& from, int64_t rows, int64_t cols, const NumbersOut& out);

// MXFP4 of the OCP microscaling formats as gpt-oss stores it: e2m1 numbers, two a byte, the first in the low half, and a
// scale 2^(e - 127) of 32 of them (e = 255: NaN). w [rows, cols / 2], scales [rows, cols / 32].
struct Mxfp4Groups {
  const uint8_t* w;
  int64_t stride;
  const uint8_t* scales;
  int64_t scale_stride;
};
void dequantize_mxfp4(const Mxfp4Groups& from, int64_t rows, int64_t cols, const NumbersOut& out);

}  // namespace kts
