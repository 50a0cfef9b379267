// Tensors from Python through DLPack: a checked view without torch headers, so one binary serves every torch version.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "kts/types.h"

namespace kts {

// Keeps the tensor, and so the memory, alive. A tensor that requires a gradient is read as if it were detached.
class TensorArg {
 public:
  // Accepts CPU tensors (pinned ones too) of the dtype name ("bf16", "f16", "f32", "i64", "u8"; "float": any of the first
  // three), with `dims` dimensions (-1: any number up to four) and unit inner stride, unless any_strides. Messages begin
  // with name + part.
  TensorArg(const pybind11::object& tensor, const char* name, const char* dtype, int dims, const char* part = "",
            bool any_strides = false);

  int64_t size(int dim) const { return shape_[dim]; }
  int64_t stride(int dim) const { return strides_[dim]; }
  int64_t numel() const;
  const char* dtype() const { return dtype_; }
  // Throws ValueError unless the shape is `expected`; -1 admits any size.
  const TensorArg& expect_shape(std::initializer_list<int64_t> expected) const;
  // Throws ValueError unless the tensor is contiguous.
  const TensorArg& expect_contiguous() const;
  // Throws ValueError: expected `expected`, got this tensor.
  [[noreturn]] void refuse(const std::string& expected) const;

  bf16_t* bf16() const { return static_cast<bf16_t*>(data_); }
  f16_t* f16() const { return static_cast<f16_t*>(data_); }
  float* f32() const { return static_cast<float*>(data_); }
  uint8_t* u8() const { return static_cast<uint8_t*>(data_); }
  int64_t* i64() const { return static_cast<int64_t*>(data_); }

 private:
  static constexpr int kMaxDims = 4;

  std::string describe() const;

  pybind11::object owner_;  // the tensor, or the capsule that was made of it
  const char* name_;
  const char* part_;
  const char* dtype_ = "";
  void* data_ = nullptr;
  int dims_ = 0;
  int64_t shape_[kMaxDims] = {};
  int64_t strides_[kMaxDims] = {};
};

}  // namespace kts
