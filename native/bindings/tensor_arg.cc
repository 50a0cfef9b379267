#include "tensor_arg.h"

#include <algorithm>

#include "gil.h"

namespace py = pybind11;

namespace kts {

namespace {

// The legacy capsule "dltensor" of the DLPack specification (dmlc/dlpack, C ABI v0.8): the part that a consumer reads.
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
};
constexpr int32_t kCpu = 1, kPinnedCuda = 3;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

std::string dtype_name(const DlTensor& t) {
  if (t.code == kBfloat && t.bits == 16) return "bf16";
  if (t.code == kFloat && t.bits == 16) return "f16";
  if (t.code == kFloat && t.bits == 32) return "f32";
  if (t.code == kInt && t.bits == 64) return "i64";
  const char* kind = t.code == kFloat ? "f" : t.code == kInt ? "i" : "type code ";
  return kind + (t.code == kFloat || t.code == kInt ? "" : std::to_string(t.code) + " bits ") + std::to_string(t.bits);
}

std::string join(const std::vector<int64_t>& values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i)
    text += (i ? ", " : "") + (values[i] < 0 ? std::string("any") : std::to_string(values[i]));
  return text + "]";
}

}  // namespace

TensorArg::TensorArg(const py::object& tensor, const char* name, const char* dtype, int dims) : name_(name) {
  if (!py::hasattr(tensor, "__dlpack__"))
    throw py::type_error(name_ + ": expected a tensor, got " + std::string(py::str(py::type::of(tensor))));
  capsule_ = call_python([&] { return py::object(tensor.attr("__dlpack__")()); });
  const auto* dl = static_cast<const DlTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
  if (dl == nullptr) throw py::error_already_set();
  dtype_ = dtype_name(*dl);
  data_ = static_cast<char*>(dl->data) + dl->byte_offset;
  shape_.assign(dl->shape, dl->shape + dl->ndim);
  strides_.resize(shape_.size());
  int64_t running = 1;
  for (size_t i = shape_.size(); i-- > 0;) {
    strides_[i] = dl->strides != nullptr ? dl->strides[i] : running;
    running *= shape_[i];
  }
  if (dl->device_type != kCpu && dl->device_type != kPinnedCuda) refuse("a CPU tensor");
  if (dtype_ != dtype) refuse(std::string("dtype ") + dtype);
  if (dl->ndim != dims) refuse(std::to_string(dims) + " dimensions");
  if (dims > 0 && shape_.back() > 1 && strides_.back() != 1) refuse("a last dimension of stride 1");
}

std::string TensorArg::describe() const { return dtype_ + " " + join(shape_) + " with strides " + join(strides_); }

void TensorArg::refuse(const std::string& expected) const {
  throw py::value_error(name_ + ": expected " + expected + ", got " + describe());
}

const TensorArg& TensorArg::expect_shape(const std::vector<int64_t>& expected) const {
  bool same = expected.size() == shape_.size();
  for (size_t i = 0; same && i < expected.size(); ++i) same = expected[i] < 0 || expected[i] == shape_[i];
  if (!same) refuse("shape " + join(expected));
  return *this;
}

const TensorArg& TensorArg::expect_contiguous() const {
  int64_t running = 1;
  if (std::find(shape_.begin(), shape_.end(), 0) != shape_.end()) return *this;  // no element, no layout
  for (size_t i = shape_.size(); i-- > 0;) {
    if (shape_[i] > 1 && strides_[i] != running) refuse("a contiguous tensor");
    running *= shape_[i];
  }
  return *this;
}

}  // namespace kts
