// Tensors of Python through DLPack: without torch headers, so one binary serves every torch version.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace kts {

// DLTensor of the DLPack specification (dmlc/dlpack, C ABI v0.8 to v1.x).
struct DlTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // elements; null = contiguous
  uint64_t byte_offset;

  char* begin() const { return static_cast<char*>(data) + byte_offset; }
  bool on_cpu() const { return device_type == 1 || device_type == 3; }  // 3: pinned for CUDA
};

// Fills `out` and returns what keeps it valid: the tensor, or a capsule that was made of it. Messages begin with `name`.
// Throws TypeError for what is no tensor, ValueError for one without memory of strides (sparse, meta, wrapped).
pybind11::object borrow(const pybind11::object& tensor, const std::string& name, DlTensor* out);

// torch's negative bit: the numbers are those in memory with the other sign.
bool is_negated(const pybind11::object& tensor);

// The same numbers in memory of their own. Throws ValueError where the tensor cannot be copied.
pybind11::object plain_copy(const pybind11::object& tensor, const std::string& name);

// Whether autograd watches it.
bool requires_grad(const pybind11::object& tensor);

}  // namespace kts
