// kts_tests [substring]: runs the cases whose names hold the substring.
#include <cstring>
#include <exception>

#include "check.h"

int main(int argc, char** argv) {
  using namespace kts::test;
  int failed = 0, passed = 0, skips = 0;
  for (const Case& test : cases()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    failures().clear();
    skipped().clear();
    try {
      test.run();
    } catch (const std::exception& error) {
      failures().push_back(std::string("exception: ") + error.what());
    }
    if (!failures().empty()) {
      ++failed;
      std::printf("FAIL %s\n", test.name);
      for (size_t i = 0; i < failures().size() && i < 5; ++i) std::printf("     %s\n", failures()[i].c_str());
      if (failures().size() > 5) std::printf("     ... and %zu more\n", failures().size() - 5);
    } else if (!skipped().empty()) {
      ++skips;
      std::printf("skip %s: %s\n", test.name, skipped().c_str());
    } else {
      ++passed;
      std::printf("ok   %s\n", test.name);
    }
    std::fflush(stdout);
  }
  std::printf("native tests: %d passed, %d failed, %d skipped\n", passed, failed, skips);
  return failed == 0 ? 0 : 1;
}
