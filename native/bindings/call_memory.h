// The memory that one call reads and writes. Results of a call whose outputs lie in its inputs, or in one another, would
// depend on which thread is first: such calls are refused.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

namespace kts {

inline constexpr int kMaxDims = 4;

enum class Access { kRead, kWrite };

// Strided bytes. Dimensions of one element have no stride (0).
struct MemoryView {
  const char* name = "";
  const char* part = "";
  Access access = Access::kRead;
  const char* data = nullptr;  // of the first element
  int dims = 0;
  int64_t item = 1;  // bytes of an element
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // bytes

  bool is_empty() const;
  // False: more elements, or bytes from the first to the last one, than numbers of 64 bits count.
  bool fits() const;
  // First byte, and the one after the last; of views that fit.
  const char* begin() const;
  const char* end() const;
  // Whether two elements may share a byte.
  bool overlaps_itself() const;
};

// Whether a byte belongs to both. Exact for views of equal strides, such as the halves of a matrix; others share memory
// as soon as the ranges do that they lie in.
bool share_memory(const MemoryView& one, const MemoryView& other);

class CallMemory {
 public:
  // Throws ValueError where the call would write what it reads or writes under another name.
  void add(const MemoryView& view);

 private:
  static constexpr size_t kMost = 32;

  std::array<MemoryView, kMost> views_;
  size_t count_ = 0;
};

}  // namespace kts
