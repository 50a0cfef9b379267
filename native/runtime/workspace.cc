#include "kts/workspace.h"

#include <sys/mman.h>

#include <new>
#include <utility>

#include "kts/base.h"

namespace kts {

PageBuffer::PageBuffer(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  // Not MAP_NORESERVE: the kernel then refuses what cannot fit at all, instead of killing the process later.
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  madvise(memory, bytes, MADV_HUGEPAGE);
  data_ = memory;
}

PageBuffer::~PageBuffer() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

PageBuffer::PageBuffer(PageBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

PageBuffer& PageBuffer::operator=(PageBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

namespace {
int64_t growths = 0;
}  // namespace

Arena pass_arena(size_t bytes) {
  // Never unmapped: a daemon thread may compute while the process exits.
  static PageBuffer& pass_memory = *new PageBuffer;
  if (bytes > pass_memory.bytes()) {
    pass_memory = PageBuffer();
    pass_memory = PageBuffer(static_cast<size_t>(align_up(static_cast<int64_t>(bytes), int64_t{1} << 21)));
    ++growths;
  }
  return Arena(pass_memory.data(), pass_memory.bytes());
}

int64_t pass_arena_growths() { return growths; }

}  // namespace kts
