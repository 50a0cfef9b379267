// Tensors from Python through DLPack: a checked view without torch headers, so one binary serves every torch version.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "kts/types.h"

namespace kts {

// Keeps the capsule, and so the memory, alive.
class TensorArg {
 public:
  // Accepts CPU tensors (pinned ones too) of the dtype name ("bf16", "f16", "f32", "i64"), with `dims` dimensions and unit
  // inner stride.
  TensorArg(const pybind11::object& tensor, const char* name, const char* dtype, int dims);

  int64_t size(int dim) const { return shape_[static_cast<size_t>(dim)]; }
  int64_t stride(int dim) const { return strides_[static_cast<size_t>(dim)]; }
  // Throws ValueError unless the shape is `expected`; -1 admits any size.
  const TensorArg& expect_shape(const std::vector<int64_t>& expected) const;
  // Throws ValueError unless the tensor is contiguous.
  const TensorArg& expect_contiguous() const;

  bf16_t* bf16() const { return static_cast<bf16_t*>(data_); }
  f16_t* f16() const { return static_cast<f16_t*>(data_); }
  float* f32() const { return static_cast<float*>(data_); }
  int64_t* i64() const { return static_cast<int64_t*>(data_); }

 private:
  [[noreturn]] void refuse(const std::string& expected) const;
  std::string describe() const;

  pybind11::object capsule_;
  std::string name_;
  std::string dtype_;
  void* data_ = nullptr;
  std::vector<int64_t> shape_;
  std::vector<int64_t> strides_;
};

}  // namespace kts
