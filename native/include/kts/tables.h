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

// A product to be made: m rows and weights W [n, k], or a part of them that one task takes.
struct GemmProduct {
  Format weights;
  Rows rows;
  Direction direction;
  int64_t m, n, k;
};

// Why a row of the table does not make a product.
enum class Refusal : int {
  kNone,
  kOtherProduct,  // other weights or the other direction
  kOtherRows,     // takes rows of another kind
  kCpu,           // the CPU lacks its instructions
  kNarrowed,      // the CPU has them, set_isa() excludes them
  kManyRows,      // more than max_m
  kLongRows,      // int8 rows beyond kMaxInt8RowLength
};

// The row with the least estimated cycles among those that `isa` can run. Throws std::invalid_argument if there is none.
const KernelRow& select_gemm(const GemmProduct& product, IsaSet isa);

// The row of that name, whether selection would take it or not. Throws std::invalid_argument unless it exists, makes the
// product and runs on this CPU.
const KernelRow& named_gemm(const char* name, const GemmProduct& product);

// What became of every row for these weights and this direction, in the order of the table: the row of least cycles
// without a refusal, the first of equals, is the one that select_gemm() takes.
struct KernelVerdict {
  const KernelRow* row;
  Refusal refusal;
  double cycles;
};
std::vector<KernelVerdict> judge_gemm(const GemmProduct& product, IsaSet isa);

// What the rows of inference are unless the user says: int8 where the CPU multiplies bytes, block floating point where it
// has vectors.
Rows default_rows(Format weights, IsaSet isa);

const char* rows_name(Rows rows);

// The table of the best level in `isa`.
const RowOps& row_ops(IsaSet isa);

// The same. AVX-512 takes AVX2's: loading is bound by memory before.
const QuantOps& quant_ops(IsaSet isa);

// Returns false for a name that kActivationNames lacks.
bool activation_from_name(const char* name, Activation* out);

}  // namespace kts
