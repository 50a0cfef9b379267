// Checks and small integer helpers used by every room. Nothing here allocates.
#pragma once
#include <cstddef>
#include <cstdint>

// Files compiled with ISA flags may use these helpers: forced inlining leaves no out-of-line copy for the linker to
// share.
#define KTS_INLINE static inline __attribute__((always_inline))
// The same for member functions.
#define KTS_MEMBER inline __attribute__((always_inline))

namespace kts {

// Throws std::invalid_argument with the message.
[[noreturn]] void fail(const char* message);

// Throws std::logic_error: what went wrong is a fault of ours. Not inline, so that files compiled with ISA flags share
// no code.
[[noreturn]] void broken_contract(const char* condition, const char* file, int line);

KTS_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
KTS_INLINE constexpr int64_t align_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
KTS_INLINE constexpr int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }

KTS_INLINE bool is_aligned(const void* memory, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(memory) % static_cast<uintptr_t>(bytes) == 0;
}

// Whether `memory` may hold `count` elements.
template <class T>
KTS_INLINE bool is_array(const T* memory, int64_t count) {
  return count == 0 || (count > 0 && memory != nullptr && is_aligned(memory, alignof(T)));
}

}  // namespace kts

// Always on: boundary checks.
#define KTS_CHECK(condition, message)       \
  do {                                      \
    if (!(condition)) ::kts::fail(message); \
  } while (0)

// Contracts between our own functions: on in the builds of tests and sanitizers, nothing in a release.
#if defined(KTS_CONTRACTS) || !defined(NDEBUG)
#define KTS_HAS_CONTRACTS 1
#define KTS_DCHECK(condition)                                                 \
  do {                                                                        \
    if (!(condition)) ::kts::broken_contract(#condition, __FILE__, __LINE__); \
  } while (0)
#define KTS_DCHECKED(call) call  // a function that holds several KTS_DCHECKs
// Small members that open with a contract: it must not make a compiler put them out of line, for the linker to share.
#define KTS_CHECKED_MEMBER KTS_MEMBER
#else
#define KTS_HAS_CONTRACTS 0
#define KTS_DCHECK(condition) ((void)0)
#define KTS_DCHECKED(call) ((void)0)
#define KTS_CHECKED_MEMBER
#endif
