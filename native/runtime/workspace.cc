#include "kts/workspace.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <new>
#include <utility>

#include "kts/base.h"

namespace kts {

namespace {

char* map_pages(size_t bytes) {
  // Not MAP_NORESERVE: the kernel then refuses what cannot fit at all, instead of killing the process later.
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw OutOfMemory(bytes);
  return static_cast<char*>(memory);
}

// Maps too much and gives back both ends: mmap alone aligns to small pages.
char* map_aligned(size_t bytes) {
  if (bytes > Arena::kMostBytes) throw OutOfMemory(bytes);
  const size_t kept = static_cast<size_t>(align_up(static_cast<int64_t>(bytes), sysconf(_SC_PAGESIZE)));
  char* all = map_pages(kept + kHugePage);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(all) % kHugePage) % kHugePage;
  if (before > 0) munmap(all, before);
  munmap(all + before + kept, kHugePage - before);
  return all + before;
}

}  // namespace

OutOfMemory::OutOfMemory(size_t bytes) noexcept {
  if (bytes > Arena::kMostBytes)
    std::snprintf(text_, sizeof(text_), "memory: expected at most 2^62 bytes, a call needs more");
  else
    std::snprintf(text_, sizeof(text_), "memory: the system refused %zu bytes", bytes);
}

void advise_huge_pages(void* memory, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

PageBuffer::PageBuffer(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  data_ = bytes < kHugePage ? map_pages(bytes) : map_aligned(bytes);
  madvise(data_, bytes, MADV_HUGEPAGE);
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
    pass_memory =
        PageBuffer(static_cast<size_t>(align_up(static_cast<int64_t>(bytes), static_cast<int64_t>(kHugePage))));
    ++growths;
  }
  return Arena(pass_memory.data(), pass_memory.bytes());
}

int64_t pass_arena_growths() { return growths; }

}  // namespace kts
