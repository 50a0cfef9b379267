// Selects and runs. PackedLinear alone calls kernel pointers itself: its callers may name a row.
#include "kts/gemm.h"

namespace kts {

namespace amx {
void release_tiles();
}

void gemm(Direction direction, const GemmTask& task) {
  KTS_DCHECK(task.m >= 0 && task.w != nullptr);  // the kernel looks at the rest
  if (task.m == 0) return;
  const PackedMatrix& w = *task.w;
  select_gemm({w.format.kind, task.rows(), direction, task.m, w.n, w.k}, active_isa()).run(task);
}

// The ISA check keeps code compiled for AMX from running elsewhere.
void gemm_end_phase() {
  if (detect_isa() & (kAmxBf16 | kAmxInt8)) amx::release_tiles();
}

}  // namespace kts
