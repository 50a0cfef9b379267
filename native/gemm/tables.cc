// The kernel tables and the choice of a row: least estimated cycles among the rows that the CPU can run.
#include "kts/tables.h"

#include <cstring>
#include <string>

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

// Cycles per weight (units in kts/tables.h). Rows beyond the last whole block run in a narrower micro-kernel: their sums
// hide less latency, so a partial block is charged half of the missing rows. A tile of AMX takes its time for 16 rows
// whether they are there or not.
static double cycles_per_weight(const KernelRow& row, int64_t m) {
  const bool tiles = (row.isa & (kAmxBf16 | kAmxInt8)) != 0;
  const double rows = static_cast<double>(m), whole = static_cast<double>(align_up(m, tiles ? kTileN : row.block_m));
  return row.weight_cycles + (tiles ? whole : 0.5 * (whole + rows)) / row.macs_per_cycle;
}

// Of one core with its operands in the caches; panels and tiles that the matrix does not fill are computed whole.
static double estimated_cycles(const KernelRow& row, const GemmProduct& product) {
  const int64_t weights = align_up(product.n, kPanel) * align_up(product.k, kTileK);
  return static_cast<double>(weights) * cycles_per_weight(row, product.m);
}

// Inlined into the choice, which every task makes: `detected` matters to those alone who ask for the reason.
KTS_INLINE Refusal refusal_of(const KernelRow& row, const GemmProduct& product, IsaSet isa, IsaSet detected) {
  if (row.format != product.weights || row.direction != product.direction) return Refusal::kOtherProduct;
  // Block floating point is for few rows: more of them are taken as the bf16 rows that they are.
  const bool falls_back = product.rows == Rows::kBfp16 && row.rows == Rows::kBf16;
  if (row.rows != product.rows && !falls_back) return Refusal::kOtherRows;
  if ((row.isa & isa) == 0) return (row.isa & detected) == 0 ? Refusal::kCpu : Refusal::kNarrowed;
  if (row.max_m > 0 && product.m > row.max_m) return Refusal::kManyRows;
  return row.rows == Rows::kInt8 && product.k > kMaxInt8RowLength ? Refusal::kLongRows : Refusal::kNone;
}

const KernelRow& select_gemm(const GemmProduct& product, IsaSet isa) {
  const GemmProduct wanted = product;  // in registers
  const KernelRow* best = nullptr;
  double least = 0.0;
  for (const KernelRow& row : kernel_table()) {
    if (refusal_of(row, wanted, isa, isa) != Refusal::kNone) continue;
    // n and k are common to all rows, so that cycles per weight decide.
    const double cycles = cycles_per_weight(row, wanted.m);
    if (best == nullptr || cycles < least) best = &row, least = cycles;
  }
  if (best == nullptr) fail("no kernel for this weight format, row format and instruction set");
  return *best;
}

const KernelRow& named_gemm(const char* name, const GemmProduct& product) {
  const auto refuse = [&](const std::string& why) { fail((std::string("kernel ") + name + ": " + why).c_str()); };
  for (const KernelRow& row : kernel_table()) {
    if (std::strcmp(row.name, name) != 0) continue;
    const Refusal why =
        row.rows != product.rows ? Refusal::kOtherRows : refusal_of(row, product, detect_isa(), detect_isa());
    if (why == Refusal::kOtherProduct || why == Refusal::kOtherRows)
      refuse("not for this weight format, rows and direction");
    if (why == Refusal::kCpu) refuse(std::string("this CPU lacks ") + isa_name(row.isa));
    if (why == Refusal::kManyRows) refuse("takes at most " + std::to_string(row.max_m) + " rows");
    if (why == Refusal::kLongRows) refuse("takes rows of at most " + std::to_string(kMaxInt8RowLength) + " elements");
    return row;
  }
  fail((std::string("kernel ") + name + ": no such row; kernel_rows() lists them").c_str());
}

std::vector<KernelVerdict> judge_gemm(const GemmProduct& product, IsaSet isa) {
  std::vector<KernelVerdict> verdicts;
  for (const KernelRow& row : kernel_table())
    if (const Refusal why = refusal_of(row, product, isa, detect_isa()); why != Refusal::kOtherProduct)
      verdicts.push_back({&row, why, estimated_cycles(row, product)});
  return verdicts;
}

Rows default_rows(Format weights, IsaSet isa) {
  if (!takes_rows(weights, Rows::kBfp16)) return Rows::kBf16;
  if (takes_rows(weights, Rows::kInt8) && (isa & (kAvx512Vnni | kAmxInt8)) != 0) return Rows::kInt8;
  return (isa & (kAvx2 | kAvx512)) != 0 ? Rows::kBfp16 : Rows::kBf16;
}

const char* rows_name(Rows rows) { return rows == Rows::kBf16 ? "bf16" : rows == Rows::kInt8 ? "int8" : "bfp16"; }

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
