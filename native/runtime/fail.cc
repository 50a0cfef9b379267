#include <stdexcept>

#include "kts/base.h"

namespace kts {

void fail(const char* message) { throw std::invalid_argument(message); }

}  // namespace kts
