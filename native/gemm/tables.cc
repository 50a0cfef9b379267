// The kernel table and the choice of a row: least estimated cycles among the rows that the CPU can run.
#include "kts/tables.h"

#include <cstring>

namespace kts {

#define KTS_KERNEL(ns, name, isa, format, rows, direction, block_m, block_n, max_m, macs, weight_cycles) \
  namespace ns {                                                                                         \
  void name(const GemmTask& task);                                                                       \
  }
#include "kernels.inc"
#undef KTS_KERNEL

const std::vector<KernelRow>& kernel_table() {
  // Never destroyed: a daemon thread may compute while the process exits.
  static const auto& table = *new std::vector<KernelRow>{
#define KTS_KERNEL(ns, name, isa, format, rows, direction, block_m, block_n, max_m, macs, weight_cycles) \
  {#name, isa,  Format::format, Rows::rows, Direction::direction, block_m, block_n,                      \
   max_m, macs, weight_cycles,  &ns::name},
#include "kernels.inc"
#undef KTS_KERNEL
  };
  return table;
}

// Cycles per weight (units in kts/gemm.h). Rows beyond the last whole block run in a narrower micro-kernel: their sums
// hide less latency, so a partial block is charged half of the missing rows. A tile of AMX takes its time for 16 rows
// whether they are there or not.
static double estimated_cost(const KernelRow& row, int64_t m) {
  const bool tiles = (row.isa & (kAmxBf16 | kAmxInt8)) != 0;
  const double rows = static_cast<double>(m), whole = static_cast<double>(align_up(m, tiles ? kTileN : row.block_m));
  return row.weight_cycles + (tiles ? whole : 0.5 * (whole + rows)) / row.macs_per_cycle;
}

const KernelRow& select_gemm(Format format, Rows rows, Direction direction, int64_t m, IsaSet isa) {
  const KernelRow* best = nullptr;
  for (const KernelRow& row : kernel_table()) {
    if ((row.isa & isa) == 0 || row.format != format || row.direction != direction) continue;
    if (row.rows != rows && !(rows == Rows::kBfp16 && row.rows == Rows::kBf16)) continue;
    if (row.max_m > 0 && m > row.max_m) continue;
    if (best == nullptr || estimated_cost(row, m) < estimated_cost(*best, m)) best = &row;
  }
  if (best == nullptr) fail("no kernel for this weight format, row format and instruction set");
  return *best;
}

const RowOps& row_ops(IsaSet isa) {
  if (isa & kAvx512) return avx512::kRowOps;
  if (isa & kAvx2) return avx2::kRowOps;
  return scalar::kRowOps;
}

const QuantOps& quant_ops(IsaSet isa) { return isa & kAvx2 ? avx2::kQuantOps : scalar::kQuantOps; }

bool activation_from_name(const char* name, Activation* out) {
  for (int i = 0; i < kNumActivations; ++i)
    if (std::strcmp(name, kActivationNames[i]) == 0) {
      *out = static_cast<Activation>(i);
      return true;
    }
  return false;
}

}  // namespace kts
