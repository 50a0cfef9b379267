// The store inside its Python object, which layers over it hold, too.
#pragma once
#include "held.h"
#include "kts/expert_store.h"

namespace kts {

using HeldStore = Held<ExpertStore>;

}  // namespace kts
