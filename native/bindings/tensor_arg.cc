#include "tensor_arg.h"

#include <algorithm>

#include "dlpack.h"
#include "kts/base.h"

namespace py = pybind11;

namespace kts {

namespace {

struct Known {
  DType dtype;
  uint8_t code;  // of DLPack
  uint8_t bits;
  const char* name;
};
constexpr Known kKnown[] = {
    {kBf16, 4, 16, "bf16"}, {kF16, 2, 16, "f16"}, {kF32, 2, 32, "f32"}, {kI64, 0, 64, "i64"}, {kU8, 1, 8, "u8"}};
constexpr Known kOthers[] = {
    {0, 2, 64, "f64"}, {0, 0, 32, "i32"}, {0, 0, 16, "i16"}, {0, 0, 8, "i8"}, {0, 6, 8, "bool"}};

Known dtype_of(const DlTensor& t) {
  const auto is_it = [&](const Known& known) { return t.code == known.code && t.bits == known.bits && t.lanes == 1; };
  for (const Known& known : kKnown)
    if (is_it(known)) return known;
  for (const Known& other : kOthers)
    if (is_it(other)) return other;
  return {0, t.code, t.bits, "another dtype"};
}

std::string names_of(DType dtypes) {
  std::string names;
  for (const Known& known : kKnown)
    if (dtypes & known.dtype) names += (names.empty() ? "" : " or ") + std::string(known.name);
  return names;
}

// kAnySize means any size of an expected shape only.
std::string join(const int64_t* values, int count, bool is_expected = false) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) {
    if (i > 0) text += ", ";
    text += is_expected && values[i] == kAnySize ? "any" : std::to_string(values[i]);
  }
  return text + "]";
}

}  // namespace

Shape::Shape(std::initializer_list<int64_t> expected) : dims(static_cast<int>(expected.size())) {
  KTS_CHECK(expected.size() <= kMaxDims, "shape: expected at most four dimensions");
  std::copy(expected.begin(), expected.end(), sizes.begin());
}

TensorArg::TensorArg(CallMemory& call, const py::object& tensor, ArgName name, DType dtypes, const Shape& shape,
                     Layout layout, Access access) {
  view_.name = name.name, view_.part = name.part, view_.access = access;
  take(tensor);
  check_layout(dtypes, shape, layout);
  const bool is_negated = kts::is_negated(tensor);
  const bool is_aligned = reinterpret_cast<uintptr_t>(view_.data) % static_cast<uintptr_t>(view_.item) == 0;
  if (access == Access::kRead && (is_negated || !is_aligned)) {
    check_memory();
    take(plain_copy(tensor, title()));
    check_layout(dtypes, shape, layout);
  } else if (access == Access::kWrite) {
    if (is_negated) refuse("a tensor without the negative bit");
    if (!is_aligned) refuse("memory aligned to the elements");
    if (kts::requires_grad(tensor)) refuse("a tensor that requires no gradient");
  }
  check_memory();
  call.add(view_);
}

void TensorArg::take(const py::object& tensor) {
  DlTensor dl;
  owner_ = borrow(tensor, title(), &dl);
  const Known known = dtype_of(dl);
  dtype_ = known.dtype, dtype_name_ = known.name;
  on_cpu_ = dl.on_cpu();
  given_dims_ = dl.ndim;
  view_.dims = dl.ndim < kMaxDims ? dl.ndim : kMaxDims;
  view_.data = dl.begin();
  view_.item = std::max(known.bits / 8, 1);
  int64_t running = 1;
  for (int i = view_.dims; i-- > 0;) {
    const int64_t size = view_.shape[i] = dl.shape[i];
    const bool is_step = size > 1 && dl.strides != nullptr;
    strides_[i] = is_step ? dl.strides[i] : running;
    // A stride that no memory has: fits() says so below.
    if (__builtin_mul_overflow(strides_[i], view_.item, &view_.strides[i])) view_.strides[i] = INT64_MAX;
    if (size <= 1) view_.strides[i] = 0;
    if (__builtin_mul_overflow(running, std::max<int64_t>(size, 1), &running)) running = INT64_MAX;
  }
}

void TensorArg::check_layout(DType dtypes, const Shape& shape, Layout layout) const {
  if (!on_cpu_) refuse("a CPU tensor");
  if (dtypes != kAnyDType && (dtype_ & dtypes) == 0) refuse("dtype " + names_of(dtypes));
  if (shape.dims >= 0 ? given_dims_ != shape.dims : given_dims_ > kMaxDims)
    refuse((shape.dims >= 0 ? std::to_string(shape.dims) : "at most four") + " dimensions");
  for (int i = 0; i < shape.dims; ++i) {
    const int64_t expected = shape.sizes[static_cast<size_t>(i)];
    if (expected != kAnySize && expected != size(i)) refuse("shape " + join(shape.sizes.data(), shape.dims, true));
  }
  const int last = view_.dims - 1;
  if (layout == Layout::kStrided || last < 0 || view_.is_empty()) return;  // no element, no layout
  if (layout == Layout::kRows && size(last) > 1 && stride(last) != 1) refuse("a last dimension of stride 1");
  int64_t running = 1;
  for (int i = last; layout == Layout::kContiguous && i >= 0; --i) {
    if (size(i) > 1 && stride(i) != running) refuse("a contiguous tensor");
    if (__builtin_mul_overflow(running, size(i), &running)) refuse("a tensor that fits into memory");
  }
}

void TensorArg::check_memory() const {
  if (!view_.fits()) refuse("a tensor that fits into memory");
  if (view_.is_empty()) return;
  if (view_.data == nullptr) refuse("a tensor with memory");
  if (view_.access == Access::kWrite && view_.overlaps_itself()) refuse("memory of its own for each element");
}

int64_t TensorArg::numel() const {
  int64_t count = 1;
  for (int i = 0; i < view_.dims; ++i) count *= size(i);
  return view_.is_empty() ? 0 : count;
}

std::string TensorArg::describe() const {
  return std::string(dtype_name_) + " " + join(view_.shape, view_.dims) + " with strides " + join(strides_, view_.dims);
}

void TensorArg::refuse(const std::string& expected) const {
  throw py::value_error(title() + ": expected " + expected + ", got " + describe());
}

void* TensorArg::as(DType dtype) const {
  if (dtype != dtype_) refuse("elements of " + names_of(dtype));
  return const_cast<char*>(view_.data);
}

}  // namespace kts
