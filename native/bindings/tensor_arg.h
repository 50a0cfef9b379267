// Tensors from Python as checked views: dtype, shape, layout and extent are looked at before there is a pointer, and the
// pointer has the dtype that was looked at.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "call_memory.h"
#include "kts/types.h"

namespace kts {

// One dtype, or the union of those that an argument may have.
using DType = unsigned;
inline constexpr DType kBf16 = 1, kF16 = 2, kF32 = 4, kI64 = 8, kU8 = 16, kAnyFloat = kBf16 | kF16 | kF32,
                       kAnyDType = ~0u;

// Any size of a dimension, in a shape.
inline constexpr int64_t kAnySize = -1;

struct Shape {
  Shape(std::initializer_list<int64_t> expected);  // NOLINT(google-explicit-constructor)
  // Of at most kMaxDims dimensions.
  static Shape any() { return Shape(-1); }

  int dims = 0;  // -1: any number
  std::array<int64_t, kMaxDims> sizes{};

 private:
  explicit Shape(int count) : dims(count) {}
};

enum class Layout { kContiguous, kRows, kStrided };  // kRows: a last dimension of stride 1

struct ArgName {
  ArgName(const char* argument, const char* part_of_it = "") : name(argument), part(part_of_it) {}  // NOLINT

  const char* name;
  const char* part;  // messages begin with name + part
};

// Keeps the tensor, and so the memory, alive.
class TensorArg {
 public:
  int64_t size(int dim) const { return view_.shape[dim]; }
  // Elements; those of a contiguous tensor where the dimension has one element or none.
  int64_t stride(int dim) const { return strides_[dim]; }
  int64_t numel() const;
  int64_t item_bytes() const { return view_.item; }
  DType dtype() const { return dtype_; }
  // Throws ValueError: expected `expected`, got this tensor.
  [[noreturn]] void refuse(const std::string& expected) const;

 protected:
  TensorArg(CallMemory& call, const pybind11::object& tensor, ArgName name, DType dtypes, const Shape& shape,
            Layout layout, Access access);
  // Throws ValueError unless the elements have the dtype.
  void* as(DType dtype) const;

 private:
  void take(const pybind11::object& tensor);
  void check_memory() const;
  void check_layout(DType dtypes, const Shape& shape, Layout layout) const;
  std::string title() const { return std::string(view_.name) + view_.part; }
  std::string describe() const;

  pybind11::object owner_;  // the tensor, a copy, or the capsule that was made of it
  MemoryView view_;
  int64_t strides_[kMaxDims] = {};
  const char* dtype_name_ = "";
  DType dtype_ = 0;
  int given_dims_ = 0;
  bool on_cpu_ = false;
};

// A tensor that is read, CPU tensors only (pinned ones, too). One that requires a gradient is read as if it were
// detached; one with the negative bit, or not aligned to its elements, is copied.
class TensorIn : public TensorArg {
 public:
  TensorIn(CallMemory& call, const pybind11::object& tensor, ArgName name, DType dtypes, const Shape& shape,
           Layout layout)
      : TensorArg(call, tensor, name, dtypes, shape, layout, Access::kRead) {}

  const bf16_t* bf16() const { return static_cast<const bf16_t*>(as(kBf16)); }
  const f16_t* f16() const { return static_cast<const f16_t*>(as(kF16)); }
  const float* f32() const { return static_cast<const float*>(as(kF32)); }
  const int64_t* i64() const { return static_cast<const int64_t*>(as(kI64)); }
  const uint8_t* u8() const { return static_cast<const uint8_t*>(as(kU8)); }
};

// A tensor that is written: no element twice, none that autograd watches, none of another argument.
class TensorOut : public TensorArg {
 public:
  TensorOut(CallMemory& call, const pybind11::object& tensor, ArgName name, DType dtypes, const Shape& shape,
            Layout layout)
      : TensorArg(call, tensor, name, dtypes, shape, layout, Access::kWrite) {}

  bf16_t* bf16() const { return static_cast<bf16_t*>(as(kBf16)); }
  f16_t* f16() const { return static_cast<f16_t*>(as(kF16)); }
  float* f32() const { return static_cast<float*>(as(kF32)); }
  // The memory, for those that look at no element.
  void* bytes() const { return as(dtype()); }

  // Aggregates that begin with the pointers `bf16` and `f32`, of which the dtype's own is set.
  template <class Output, class... Rest>
  Output as_output(Rest... rest) const {
    if (dtype() == kBf16) return Output{bf16(), nullptr, rest...};
    return Output{nullptr, f32(), rest...};
  }
};

}  // namespace kts
