// A small test runner: KTS_TEST(name) { ... KTS_EXPECT(condition) << "detail"; }
#pragma once
#include <cstdio>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

namespace kts::test {

struct Case {
  const char* name;
  std::function<void()> run;
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline std::vector<std::string>& failures() {
  static std::vector<std::string> all;
  return all;
}

inline std::string& skipped() {
  static std::string reason;
  return reason;
}

struct Register {
  Register(const char* name, std::function<void()> run) { cases().push_back({name, std::move(run)}); }
};

// Collects the message of one failed expectation.
class Failure {
 public:
  Failure(const char* file, int line, const char* condition) {
    text_ << file << ":" << line << ": expected " << condition << " ";
  }
  ~Failure() { failures().push_back(text_.str()); }
  template <class T>
  Failure& operator<<(const T& value) {
    text_ << value;
    return *this;
  }

 private:
  std::ostringstream text_;
};

// A deterministic source of numbers, the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 1) {}
  uint32_t next() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state_ >> 33);
  }
  int integer(int low, int high) { return low + static_cast<int>(next() % static_cast<uint32_t>(high - low + 1)); }
  float real() { return static_cast<float>(next()) / 1073741824.0f - 1.0f; }  // [-1, 1)

 private:
  uint64_t state_;
};

}  // namespace kts::test

#define KTS_TEST(name)                                             \
  static void name();                                              \
  static const ::kts::test::Register register_##name(#name, name); \
  static void name()

#define KTS_EXPECT(condition) \
  if (condition) {            \
  } else                      \
    ::kts::test::Failure(__FILE__, __LINE__, #condition)

#define KTS_SKIP(reason)               \
  do {                                 \
    ::kts::test::skipped() = (reason); \
    return;                            \
  } while (0)
