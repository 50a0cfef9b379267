// Checks and small integer helpers used by every room. Nothing here allocates.
#pragma once
#include <cstddef>
#include <cstdint>

// Files compiled with ISA flags may use these helpers: forced inlining leaves no out-of-line copy for the linker to
// share.
#define KTS_INLINE static inline __attribute__((always_inline))

namespace kts {

// Throws std::invalid_argument with the message.
[[noreturn]] void fail(const char* message);

KTS_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
KTS_INLINE constexpr int64_t align_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
KTS_INLINE constexpr int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace kts

// Always on: boundary checks.
#define KTS_CHECK(condition, message)       \
  do {                                      \
    if (!(condition)) ::kts::fail(message); \
  } while (0)

// Debug builds only: inner checks.
#ifdef NDEBUG
#define KTS_DCHECK(condition) ((void)0)
#else
#define KTS_DCHECK(condition) KTS_CHECK(condition, #condition)
#endif
