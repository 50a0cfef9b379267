// A bump arena. The same layout function runs twice: once on an empty arena to count bytes, once to hand out memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>

namespace kts {

// Says how many bytes were wanted.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(size_t bytes) noexcept;
  const char* what() const noexcept override { return text_; }

 private:
  char text_[96];
};

class Arena {
 public:
  static constexpr size_t kMostBytes = size_t{1} << 62;

  Arena() = default;
  Arena(void* base, size_t bytes) : base_(static_cast<char*>(base)), capacity_(bytes) {}

  // `count` objects, 64-byte aligned; null while counting. Throws OutOfMemory for more bytes than there are addresses.
  template <class T>
  T* take(int64_t count) {
    const size_t begin = (used_ + 63) / 64 * 64;
    size_t bytes = 0;
    if (count < 0 || __builtin_mul_overflow(static_cast<size_t>(count), sizeof(T), &bytes) ||
        bytes > kMostBytes - begin)
      throw OutOfMemory(SIZE_MAX);
    used_ = begin + bytes;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + begin);
  }
  size_t used() const { return used_; }
  size_t capacity() const { return capacity_; }

 private:
  char* base_ = nullptr;
  size_t capacity_ = 0;
  size_t used_ = 0;
};

inline constexpr size_t kHugePage = size_t{2} << 20;

// Asks for huge pages for the whole ones inside [memory, memory + bytes) that nobody has written yet. Best effort.
void advise_huge_pages(void* memory, size_t bytes);

// Anonymous memory, zero until written, huge pages advised: aligned to one from that size on, to a small page below.
// Throws OutOfMemory.
class PageBuffer {
 public:
  PageBuffer() = default;
  explicit PageBuffer(size_t bytes);
  ~PageBuffer();
  PageBuffer(PageBuffer&& other) noexcept;
  PageBuffer& operator=(PageBuffer&& other) noexcept;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// The scratch of the running pass: grows, never shrinks. Use while Runtime::mutex is held.
Arena pass_arena(size_t bytes);
// Number of times the scratch had to grow (a training step of fixed shape must not change it).
int64_t pass_arena_growths();

}  // namespace kts
