#include "tensor_arg.h"

#include <cstring>

#include "gil.h"

namespace py = pybind11;

namespace kts {

namespace {

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
};
constexpr int32_t kCpu = 1, kPinnedCuda = 3;
constexpr uint8_t kInt = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4;

// DLPackExchangeAPI of the same specification from v1.3 on: functions of a tensor type, without a capsule per tensor.
struct DlExchange {
  uint32_t major;
  uint32_t minor;
  const DlExchange* previous;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*borrow)(void* tensor, DlTensor* out);  // may be null; valid while the tensor lives; 0 = done
};
constexpr uint32_t kExchangeMajor = 1;

// Of the tensor's type, null where it has none: torch before 2.10.
const DlExchange* exchange_of(const py::object& tensor) {
  static PyObject* const name = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  PyObject* capsule = PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())), name);
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  const auto* api = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);  // the table outlives it: it is static
  if (api == nullptr) PyErr_Clear();
  while (api != nullptr && api->major != kExchangeMajor) api = api->previous;
  return api != nullptr && api->borrow != nullptr ? api : nullptr;
}

// Fills `out` and returns what keeps it valid.
py::object borrow(const py::object& tensor, const std::string& name, DlTensor* out) {
  if (const DlExchange* api = exchange_of(tensor)) {
    if (call_python([&] { return api->borrow(tensor.ptr(), out); }) != 0) throw py::error_already_set();
    return tensor;
  }
  if (!py::hasattr(tensor, "__dlpack__"))
    throw py::type_error(name + ": expected a tensor, got " + std::string(py::str(py::type::of(tensor))));
  py::object capsule = call_python([&] {
    const bool has_graph = py::cast<bool>(py::getattr(tensor, "requires_grad", py::bool_(false)));
    return py::object((has_graph ? tensor.attr("detach")() : tensor).attr("__dlpack__")());
  });
  const auto* dl = static_cast<const DlTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (dl == nullptr) throw py::error_already_set();
  *out = *dl;
  return capsule;
}

const char* dtype_name(const DlTensor& t) {
  if (t.code == kBfloat && t.bits == 16) return "bf16";
  if (t.code == kFloat) return t.bits == 16 ? "f16" : t.bits == 32 ? "f32" : t.bits == 64 ? "f64" : "another float";
  if (t.code == kInt) return t.bits == 64 ? "i64" : t.bits == 32 ? "i32" : t.bits == 8 ? "i8" : "another integer";
  if (t.code == kUnsigned) return t.bits == 8 ? "u8" : "another unsigned integer";
  return "another dtype";
}

bool dtype_fits(const char* dtype, const char* expected) {
  if (std::strcmp(expected, "float") != 0) return std::strcmp(dtype, expected) == 0;
  return std::strcmp(dtype, "f32") == 0 || std::strcmp(dtype, "bf16") == 0 || std::strcmp(dtype, "f16") == 0;
}

std::string join(const int64_t* values, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i) {
    if (i > 0) text += ", ";
    text += values[i] < 0 ? "any" : std::to_string(values[i]);
  }
  return text + "]";
}

}  // namespace

TensorArg::TensorArg(const py::object& tensor, const char* name, const char* dtype, int dims, const char* part,
                     bool any_strides)
    : name_(name), part_(part) {
  DlTensor dl;
  owner_ = borrow(tensor, std::string(name) + part, &dl);
  dtype_ = dtype_name(dl);
  data_ = static_cast<char*>(dl.data) + dl.byte_offset;
  dims_ = dl.ndim < kMaxDims ? dl.ndim : kMaxDims;
  int64_t running = 1;
  for (int i = dims_; i-- > 0;) {
    shape_[i] = dl.shape[i];
    strides_[i] = dl.strides != nullptr ? dl.strides[i] : running;
    running *= shape_[i];
  }
  if (dl.device_type != kCpu && dl.device_type != kPinnedCuda) refuse("a CPU tensor");
  if (!dtype_fits(dtype_, dtype)) refuse(std::string("dtype ") + dtype);
  if (dims >= 0 ? dl.ndim != dims : dl.ndim > kMaxDims)
    refuse((dims >= 0 ? std::to_string(dims) : "at most four") + " dimensions");
  if (!any_strides && dims_ > 0 && shape_[dims_ - 1] > 1 && strides_[dims_ - 1] != 1)
    refuse("a last dimension of stride 1");
}

int64_t TensorArg::numel() const {
  int64_t count = 1;
  for (int i = 0; i < dims_; ++i) count *= shape_[i];
  return count;
}

std::string TensorArg::describe() const {
  const size_t dims = static_cast<size_t>(dims_);
  return std::string(dtype_) + " " + join(shape_, dims) + " with strides " + join(strides_, dims);
}

void TensorArg::refuse(const std::string& expected) const {
  throw py::value_error(std::string(name_) + part_ + ": expected " + expected + ", got " + describe());
}

const TensorArg& TensorArg::expect_shape(std::initializer_list<int64_t> expected) const {
  bool same = static_cast<int>(expected.size()) == dims_;
  for (int i = 0; same && i < dims_; ++i) same = expected.begin()[i] < 0 || expected.begin()[i] == shape_[i];
  if (!same) refuse("shape " + join(expected.begin(), expected.size()));
  return *this;
}

const TensorArg& TensorArg::expect_contiguous() const {
  if (numel() == 0) return *this;  // no element, no layout
  int64_t running = 1;
  for (int i = dims_; i-- > 0;) {
    if (shape_[i] > 1 && strides_[i] != running) refuse("a contiguous tensor");
    running *= shape_[i];
  }
  return *this;
}

}  // namespace kts
