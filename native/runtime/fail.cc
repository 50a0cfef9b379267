#include <stdexcept>
#include <string>

#include "kts/base.h"

namespace kts {

void fail(const char* message) { throw std::invalid_argument(message); }

void broken_contract(const char* condition, const char* file, int line) {
  throw std::logic_error(std::string("broken contract: ") + condition + " (" + file + ":" + std::to_string(line) + ")");
}

}  // namespace kts
