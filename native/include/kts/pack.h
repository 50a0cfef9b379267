// Weights into the layout of kts/packed.h and back; names and sizes of its formats.
#pragma once
#include <cstdint>

#include "kts/packed.h"

namespace kts {

// Bytes of the values of a panel of k columns, and of its scales (int8: of its rows).
int64_t panel_value_bytes(WeightFormat format, int64_t k);
int64_t panel_scale_bytes(WeightFormat format, int64_t k);

// Bytes of values, scales and sums, a multiple of 64; all zero bytes of it are read as zero weights but for int4.
int64_t packed_bytes(WeightFormat format, int64_t n, int64_t k);

// The view of packed_bytes() bytes at `memory`, 64-byte aligned.
PackedMatrix packed_view(WeightFormat format, int64_t n, int64_t k, const void* memory);

// Rows [n_begin, n_begin + n) and columns [k_begin, k_begin + k) of a matrix where they lie: whole panels from n_begin on,
// whole units of k (WeightFormat::k_unit) from k_begin on, but for what ends with the matrix. Of int8 with fewer columns
// than the matrix, column_sums is null: the caller has them (sum_columns).
PackedMatrix packed_part(const PackedMatrix& whole, int64_t n_begin, int64_t n, int64_t k_begin, int64_t k);

// Copies values and scales of one panel between matrices of one format and size, which may differ in strides. column_sums
// stay as they are.
void copy_panel(const PackedMatrix& from, const PackedMatrix& to, int64_t panel);

// int8: sums over k of the integers of a panel [32].
void sum_columns(const PackedMatrix& w, int64_t panel, int32_t* sums);

// The contract of what packs and unpacks panels [begin, end).
void check_panels(const PackedMatrix& w, int64_t begin, int64_t end);

// Elements of each row of w before and after the k that are packed: int8 scales are those of the whole row, so that
// weights do not depend on how a matrix is cut into shards.
struct RowPart {
  int64_t before = 0;
  int64_t after = 0;
};

// Quantises (kts/quant.h) and packs panels [panel_begin, panel_end) of w [n, k], row stride in elements. Panels are
// independent.
void pack_panels(const bf16_t* w, int64_t stride, const PackedMatrix& packed, int64_t panel_begin, int64_t panel_end,
                 const RowPart& part = {});

// int4 weights as a checkpoint holds them: q + 8 in half bytes, the lower one first, q in -8 .. 7.
struct StoredInt4 {
  const uint8_t* q = nullptr;      // [n, k / 2], k even
  int64_t stride = 0;              // bytes
  const bf16_t* scales = nullptr;  // [n, ceil(k / group)]
  int64_t scale_stride = 0;
};

// Packs panels of a matrix of format any_scale without changing a number. A scale that is NaN or infinite throws
// std::invalid_argument.
void pack_stored_int4(const StoredInt4& w, const PackedMatrix& packed, int64_t panel_begin, int64_t panel_end);

// Packs panels of w as a GGUF file holds it: rows of blocks (f16: of elements), row_bytes apart. w begins with the first
// block that is packed. Non-finite scales throw std::invalid_argument.
void pack_block_panels(const uint8_t* w, int64_t row_bytes, const PackedMatrix& packed, int64_t panel_begin,
                       int64_t panel_end);
// Bytes of k elements of a row in the file.
int64_t block_row_bytes(WeightFormat format, int64_t k);

// The stored weights: writes rows of w [n, k] that belong to the given panels. bf16 is rounded from q * scale.
void unpack_panels(const PackedMatrix& packed, int64_t panel_begin, int64_t panel_end, bf16_t* w, int64_t stride);
void unpack_panels(const PackedMatrix& packed, int64_t panel_begin, int64_t panel_end, float* w, int64_t stride);

// Weights, one output channel: int8_scale of the row. Returns the scale. A NaN or infinity in the row throws
// std::invalid_argument.
float quantize_row_int8(const bf16_t* w, int64_t count, int8_t* q);

// int4, symmetric per group of at most 128: q = clamp(round(w / scale), -8, 7). The scale, of either sign, is the
// candidate of least squared error (gemm/quantize.cc says which are tried), a normal bf16 number of at most 5 significant
// bits, so that q * scale is exact in bf16 and finite. Returns the scale; 0 for a group of zeros. A NaN or infinity
// throws std::invalid_argument. Relative RMS error of Gaussian weights: 0.082, 0.090, 0.097 for groups of 32, 64, 128.
float quantize_group_int4(const bf16_t* w, int64_t count, int8_t* q);

const char* format_name(WeightFormat format);
// Of what the kernels see: bf16, int8, int4, f16, block4, ...
const char* kernel_format_name(Format format);
// Throws std::invalid_argument unless W [n, k] can have the format: whole blocks along k.
void check_format(WeightFormat format, int64_t k);
// bf16, int8, int4, rawint4 (int4 with any_scale) or a type of GGUF files. Throws std::invalid_argument for an unknown
// name or group.
WeightFormat weight_format(const char* name, int group);

}  // namespace kts
