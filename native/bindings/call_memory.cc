#include "call_memory.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "kts/base.h"

namespace kts {

namespace {

// Dimensions of more than one element, by falling magnitude of their strides.
struct Steps {
  int count = 0;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];  // magnitudes, bytes

  explicit Steps(const MemoryView& view) {
    int order[kMaxDims];
    for (int i = 0; i < view.dims; ++i)
      if (view.shape[i] > 1) order[count++] = i;
    const auto magnitude = [&](int i) { return std::abs(view.strides[i]); };
    std::stable_sort(order, order + count, [&](int a, int b) { return magnitude(a) > magnitude(b); });
    for (int i = 0; i < count; ++i) size[i] = view.shape[order[i]], stride[i] = magnitude(order[i]);
  }
  // Bytes from the first to the end of the last element of the dimensions from `first` on.
  int64_t reach(int first, int64_t item) const {
    int64_t bytes = item;
    for (int i = first; i < count; ++i) bytes += (size[i] - 1) * stride[i];
    return bytes;
  }
};

// Whether elements `distance` bytes apart meet, which are made of the steps from `step` on: distance = sum (i - j) stride
// for indices i of `one` and j of `other`.
bool meets(const Steps& one, const Steps& other, int step, int64_t distance, int64_t item) {
  if (step == one.count) return std::abs(distance) < item;
  const int64_t stride = one.stride[step];
  const int64_t low = -other.reach(step + 1, item) + 1, high = one.reach(step + 1, item) - 1;  // of what remains
  constexpr int64_t kMostTried = 4;  // nested steps, as tensors have them, leave two
  const int64_t first = std::max(-(other.size[step] - 1), (distance - high) / stride - 1);
  const int64_t last = std::min(one.size[step] - 1, (distance - low) / stride + 1);
  int64_t tried = 0;
  for (int64_t i = first; i <= last; ++i) {
    const int64_t rest = distance - i * stride;
    if (rest < low || rest > high) continue;
    if (++tried > kMostTried || meets(one, other, step + 1, rest, item)) return true;
  }
  return false;
}

// Of a dimension, empty tensors and repeated elements included: no address space has more, and a few of them multiplied by
// the sizes of blocks still fit into 64 bits.
constexpr int64_t kMostElements = int64_t{1} << 48;

std::string title(const MemoryView& view) { return std::string(view.name) + view.part; }

}  // namespace

bool MemoryView::is_empty() const {
  return std::any_of(shape, shape + dims, [](int64_t size) { return size == 0; });
}

bool MemoryView::fits() const {
  if (std::any_of(shape, shape + dims, [](int64_t size) { return size < 0 || size > kMostElements; })) return false;
  if (is_empty()) return true;
  int64_t count = item, bytes = item;
  for (int i = 0; i < dims; ++i) {
    int64_t reach = 0;
    if (strides[i] == INT64_MIN || __builtin_mul_overflow(count, shape[i], &count)) return false;
    if (__builtin_mul_overflow(shape[i] - 1, std::abs(strides[i]), &reach)) return false;
    if (__builtin_add_overflow(bytes, reach, &bytes)) return false;
  }
  return true;
}

const char* MemoryView::begin() const {
  const char* first = data;
  for (int i = 0; i < dims; ++i)
    if (strides[i] < 0) first += (shape[i] - 1) * strides[i];
  return first;
}

const char* MemoryView::end() const {
  const char* last = data + item;
  for (int i = 0; i < dims; ++i)
    if (strides[i] > 0) last += (shape[i] - 1) * strides[i];
  return last;
}

bool MemoryView::overlaps_itself() const {
  if (is_empty()) return false;
  const Steps steps(*this);
  for (int i = 0; i < steps.count; ++i)
    if (steps.stride[i] < steps.reach(i + 1, item)) return true;
  return false;
}

bool share_memory(const MemoryView& one, const MemoryView& other) {
  if (one.is_empty() || other.is_empty()) return false;
  if (one.end() <= other.begin() || other.end() <= one.begin()) return false;
  const Steps mine(one), theirs(other);
  const bool same_steps = one.item == other.item && mine.count == theirs.count &&
                          std::equal(mine.stride, mine.stride + mine.count, theirs.stride);
  if (!same_steps || std::find(mine.stride, mine.stride + mine.count, 0) != mine.stride + mine.count) return true;
  return meets(mine, theirs, 0, other.begin() - one.begin(), one.item);
}

void CallMemory::add(const MemoryView& view) {
  for (size_t i = 0; i < count_; ++i) {
    const MemoryView& before = views_[i];
    if (view.access == Access::kRead && before.access == Access::kRead) continue;
    if (!share_memory(view, before)) continue;
    const bool is_written = view.access == Access::kWrite;
    throw pybind11::value_error((is_written ? title(view) : title(before)) +
                                ": expected memory of its own, got that of " +
                                (is_written ? title(before) : title(view)));
  }
  KTS_CHECK(count_ < kMost, "expected fewer tensors in one call");
  views_[count_++] = view;
}

}  // namespace kts
