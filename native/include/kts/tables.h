// The tables of kernels and the one place where a row of them is chosen.
#pragma once
#include <vector>

#include "kts/cpu_isa.h"
#include "kts/elementwise.h"
#include "kts/kernel.h"
#include "kts/quant.h"

namespace kts {

// Whether there are kernels for these rows and weights. Block floating point falls back to bf16 rows where it has none.
KTS_INLINE bool takes_rows(Format weights, Rows rows) {
  if (rows == Rows::kBf16 || weights == Format::kInt8 || weights == Format::kInt4) return true;
  return rows == Rows::kBfp16 && is_block_format(weights);
}

// One row of gemm/kernels.inc.
struct KernelRow {
  const char* name;
  Isa isa;
  Format format;
  Rows rows;
  Direction direction;
  int block_m;
  int block_n;
  int64_t max_m;  // rows that it takes; 0: any number
  // The cost estimate, for one core with operands in its caches: cycles = weights * (weight_cycles + rows / macs_per_cycle).
  double macs_per_cycle;  // multiply-adds per cycle of a whole block
  double weight_cycles;   // per weight: unpacking, transposing or loading it, whatever the number of rows
  GemmFn run;
};

const std::vector<KernelRow>& kernel_table();

// The row with the least estimated cost for m rows among those that `isa` can run.
const KernelRow& select_gemm(Format format, Rows rows, Direction direction, int64_t m, IsaSet isa);

// The table of the best level in `isa`.
const RowOps& row_ops(IsaSet isa);

// The same. AVX-512 takes AVX2's: loading is bound by memory before.
const QuantOps& quant_ops(IsaSet isa);

// Returns false for a name that kActivationNames lacks.
bool activation_from_name(const char* name, Activation* out);

}  // namespace kts
