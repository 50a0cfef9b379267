// A frozen linear layer y = a W^T + bias and its input gradient, from one packed copy of W (kts/packed.h).
#pragma once
#include <cstdint>

#include "kts/gemm.h"
#include "kts/workspace.h"

namespace kts {

// A row-major matrix to be filled; exactly one of the two pointers.
struct LinearOutput {
  bf16_t* bf16 = nullptr;
  float* f32 = nullptr;
  int64_t stride = 0;  // elements
};

class PackedLinear {
 public:
  // n outputs, k inputs
  PackedLinear(int64_t n, int64_t k, WeightFormat format);

  int64_t n() const { return n_; }
  int64_t k() const { return k_; }
  WeightFormat format() const { return format_; }
  int64_t packed_bytes() const { return static_cast<int64_t>(weights_.bytes()); }
  PackedMatrix weight() const { return packed_view(format_, n_, k_, weights_.data()); }

  // w [n, k], row stride in elements. Packs a copy; after an exception (a weight that is not finite cannot be
  // quantised) the layer has no weights.
  void load(const bf16_t* w, int64_t stride);
  // Rows of blocks as in a GGUF file, row_bytes apart; f16 and block formats.
  void load_blocks(const uint8_t* w, int64_t row_bytes);
  // The stored weights.
  void unpack(bf16_t* w, int64_t stride) const;
  void unpack(float* w, int64_t stride) const;

  // out [m, n] = a [m, k] W^T + bias: sums in f32, the bias (f32 [n] or null) added to them, rounded once.
  // `kernel`: name of a row of the table to use instead of the selected one; null or "" selects.
  void forward(const bf16_t* a, int64_t a_stride, int64_t m, Rows rows, const float* bias, const char* kernel,
               const LinearOutput& out) const;
  // out [m, k] = dy [m, n] W
  void input_grad(const bf16_t* dy, int64_t dy_stride, int64_t m, const char* kernel, const LinearOutput& out) const;

 private:
  void check_loaded() const;
  template <class T>
  void unpack_parallel(T* w, int64_t stride) const;

  int64_t n_;
  int64_t k_;
  WeightFormat format_;
  PageBuffer weights_;
  int placed_pools_ = 0;  // thread pools whose memory the panels lie in, in order; 0 = not placed
  bool loaded_ = false;
};

}  // namespace kts
