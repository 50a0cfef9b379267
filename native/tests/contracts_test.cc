// A caller that breaks a contract of kts/base.h is told so, at the entry of every kernel, by the packed views and by the
// row operations; one that keeps it is not.
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "kts/gemm.h"
#include "rows_problem.h"

#if !KTS_HAS_CONTRACTS
#error "the tests are built with contracts: see KTS_CONTRACTS in CMakeLists.txt"
#endif

namespace kts::test {
namespace {

// The condition that was broken; empty if none was.
std::string broken_by(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::logic_error& error) {
    return std::strncmp(error.what(), "broken contract: ", 17) == 0 ? error.what() + 17 : "";
  }
  return "";
}

// One task of a row of the table with all that it reads and writes.
struct OneTask {
  WeightFormat format;
  Problem problem;
  PackedMatrix w;
  std::vector<const bf16_t*> rows;
  std::vector<const int8_t*> q;
  std::vector<float> c;
  Bytes scratch{kGemmScratchBytes, 0};
  GemmTask task;

  OneTask(const KernelRow& row, WeightFormat f, int64_t m, Random& random)
      : format(f), problem(f, {m, 80, k_of(f)}, random, Values::kReals), w(problem.w.matrix()) {
    const bool forward = row.direction == Direction::kForward;
    const int64_t inner = forward ? w.k : w.n;
    for (int64_t i = 0; i < m; ++i) {
      rows.push_back((forward ? problem.forward_a : problem.grad_a).data() + i * inner);
      q.push_back(problem.q_rows.data() + i * align_up(w.k, 64));
    }
    c.resize(static_cast<size_t>(m * kPanel));
    task.a_rows = rows.data();
    task.m = m;
    task.w = &w;
    task.panel_end = 1;
    task.c = c.data();
    task.ldc = kPanel;
    task.scratch = scratch.data();
    if (row.rows == Rows::kInt8) task.q_rows = q.data(), task.q_scales = problem.q_scales.data();
  }

 private:
  static int64_t k_of(WeightFormat f) { return is_block_format(f.kind) ? block_type_info(f.type).block : 70; }
};

struct Fault {
  const char* name;
  std::function<void(OneTask&)> plant;
};

// What no row of the table puts up with.
std::vector<Fault> faults(const KernelRow& row) {
  std::vector<Fault> all = {
      {"no weights", [](OneTask& t) { t.task.w = nullptr; }},
      {"packed memory that is not there", [](OneTask& t) { t.w.data = nullptr; }},
      {"packed memory that is not aligned", [](OneTask& t) { t.w.data = t.w.panel(0) + 16; }},
      {"weights of another format",
       [](OneTask& t) { t.w.format.kind = t.w.format.kind == Format::kBf16 ? Format::kF16 : Format::kBf16; }},
      {"no columns", [](OneTask& t) { t.task.panel_end = t.task.panel_begin; }},
      {"panels before the first", [](OneTask& t) { t.task.panel_begin = -1; }},
      {"panels beyond the last", [](OneTask& t) { t.task.panel_begin = 90, t.task.panel_end = 91; }},
      {"rows of c that overlap", [](OneTask& t) { t.task.ldc = kPanel - 1; }},
      {"no c", [](OneTask& t) { t.task.c = nullptr; }},
      {"no scratch", [](OneTask& t) { t.task.scratch = nullptr; }},
      {"scratch that is not aligned", [](OneTask& t) { t.task.scratch = t.scratch.data() + 32; }},
      {"no rows", [](OneTask& t) { t.task.m = 0; }},
      {"rows that begin before their memory", [](OneTask& t) { t.task.a_offset = -1; }},
  };
  if (row.rows == Rows::kInt8) {
    all.push_back({"a row that is not there", [](OneTask& t) { t.q.back() = nullptr; }});
    all.push_back({"no scales of rows", [](OneTask& t) { t.task.q_scales = nullptr; }});
    all.push_back(
        {"a row that does not end in zeros", [](OneTask& t) { t.problem.q_rows[static_cast<size_t>(t.w.k)] = 1; }});
  } else {
    all.push_back({"a row that is not there", [](OneTask& t) { t.rows.back() = nullptr; }});
    all.push_back({"no pointers to rows", [](OneTask& t) { t.task.a_rows = nullptr; }});
  }
  if (!may_accumulate(row)) all.push_back({"sums that go on", [](OneTask& t) { t.task.accumulate = true; }});
  if (row.format != Format::kBf16 && row.format != Format::kF16)
    all.push_back({"no scales", [](OneTask& t) { t.w.scales = nullptr; }});
  if (row.format == Format::kInt8) all.push_back({"no column sums", [](OneTask& t) { t.w.column_sums = nullptr; }});
  if (row.format == Format::kInt4)
    all.push_back({"a group that no scale has", [](OneTask& t) { t.w.format.group = 48; }});
  if (is_block_format(row.format)) all.push_back({"rows of broken blocks", [](OneTask& t) { t.w.k -= 1; }});
  return all;
}

}  // namespace

KTS_TEST(every_kernel_refuses_a_broken_task) {
  for (const KernelRow& row : kernel_table()) {
    if ((detect_isa() & row.isa) == 0) continue;
    const WeightFormat format = formats_of(row.format).front();
    for (const Fault& fault : faults(row)) {
      Random random(3);
      OneTask one(row, format, 2, random);
      KTS_EXPECT(broken_by([&] { row.run(one.task); }).empty()) << row.name << " took a task for broken";
      fault.plant(one);
      KTS_EXPECT(!broken_by([&] { row.run(one.task); }).empty()) << row.name << " took " << fault.name;
    }
  }
}

KTS_TEST(kernels_of_few_rows_refuse_more) {
  for (const KernelRow& row : kernel_table()) {
    // dgemv and the int8 rows go on in blocks; selection alone holds them to few rows.
    const bool goes_on = row.direction == Direction::kInputGrad || row.rows == Rows::kInt8;
    if ((detect_isa() & row.isa) == 0 || row.max_m == 0 || goes_on) continue;
    Random random(3);
    OneTask one(row, formats_of(row.format).front(), row.max_m + 1, random);
    KTS_EXPECT(broken_by([&] { row.run(one.task); }).find("max_rows") != std::string::npos) << row.name;
  }
}

KTS_TEST(packed_views_refuse_what_their_format_lacks) {
  Random random(4);
  PackedProblem bf16({Format::kBf16, 0}, 40, 70, Values::kReals, random);
  PackedProblem int8({Format::kInt8, 0}, 40, 70, Values::kReals, random);
  PackedProblem int4({Format::kInt4, 32}, 40, 70, Values::kReals, random);
  PackedProblem q4(weight_format("q4_0", 0), 40, 64, Values::kReals, random);
  KTS_EXPECT(!broken_by([&] { bf16.matrix().int8_scales(); }).empty());
  KTS_EXPECT(!broken_by([&] { int8.matrix().int4_scales(0); }).empty());
  KTS_EXPECT(!broken_by([&] { int8.matrix().k_groups(); }).empty());
  KTS_EXPECT(!broken_by([&] { int4.matrix().int8_scales(); }).empty());
  KTS_EXPECT(!broken_by([&] { int4.matrix().scale_record(0, 0); }).empty());
  KTS_EXPECT(!broken_by([&] { packed_integer(bf16.matrix(), 0, 0); }).empty());
  for (PackedProblem* packed : {&int8, &int4, &q4}) {
    const PackedMatrix w = packed->matrix();
    KTS_EXPECT(broken_by([&] { packed_unscaled(w, w.n - 1, w.k - 1); }).empty());
    KTS_EXPECT(!broken_by([&] { packed_unscaled(w, w.n, 0); }).empty());
    KTS_EXPECT(!broken_by([&] { packed_unscaled(w, 0, w.k); }).empty());
    KTS_EXPECT(!broken_by([&] { packed_unscaled(w, -1, 0); }).empty());
    std::vector<float> out(static_cast<size_t>(w.n * w.k));
    KTS_EXPECT(broken_by([&] { unpack_panels(w, 0, w.n_panels(), out.data(), w.k); }).empty());
    KTS_EXPECT(!broken_by([&] { unpack_panels(w, 0, w.n_panels() + 1, out.data(), w.k); }).empty());
    KTS_EXPECT(!broken_by([&] { unpack_panels(w, 0, 1, out.data(), w.k - 1); }).empty());
  }
  KTS_EXPECT(!broken_by([&] { packed_view({Format::kBf16, 0}, 40, 70, bf16.memory.data() + 2); }).empty());
  const std::vector<bf16_t> w(40 * 70);
  KTS_EXPECT(!broken_by([&] { pack_panels(w.data(), 70, bf16.matrix(), 1, 3); }).empty());
  KTS_EXPECT(!broken_by([&] { pack_panels(w.data(), 69, bf16.matrix(), 0, 1); }).empty());
  KTS_EXPECT(!broken_by([&] { pack_panels(nullptr, 70, int8.matrix(), 0, 1); }).empty());
  KTS_EXPECT(!broken_by([&] { pack_block_panels(nullptr, 36, q4.matrix(), 0, 1); }).empty());
}

KTS_TEST(row_operations_refuse_broken_calls) {
  alignas(64) float f[64] = {}, to[64] = {};
  alignas(64) bf16_t b[64] = {}, b_out[64] = {};
  alignas(64) f16_t h[64] = {};
  int8_t q[64] = {};
  const bf16_t* b_rows[] = {b, nullptr};
  const float* f_rows[] = {f, nullptr};
  const GateParams gate;
  for (const RowOps* ops : {&scalar::kRowOps, &avx2::kRowOps, &avx512::kRowOps}) {
    if ((detect_isa() & ops->isa) == 0) continue;
    const char* isa = isa_name(ops->isa);
    for (const GluOps& glu : ops->glu) {
      KTS_EXPECT(broken_by([&] { glu.forward(gate, f, f, 9, h, h, b_out); }).empty()) << isa;
      KTS_EXPECT(!broken_by([&] { glu.forward(gate, f, f, 9, h, nullptr, b_out); }).empty()) << isa;
      KTS_EXPECT(!broken_by([&] { glu.forward(gate, nullptr, f, 9, h, h, b_out); }).empty()) << isa;
      KTS_EXPECT(!broken_by([&] { glu.backward(gate, h, h, nullptr, 1.0f, 9, b_out, b_out, b_out); }).empty()) << isa;
    }
    KTS_EXPECT(!broken_by([&] { ops->scale_add(1.0f, f, -1, to); }).empty()) << isa;
    KTS_EXPECT(!broken_by([&] { ops->scale_add(1.0f, nullptr, 3, to); }).empty()) << isa;
    KTS_EXPECT(!broken_by([&] { ops->to_bf16(f, 3, nullptr); }).empty()) << isa;
    KTS_EXPECT(broken_by([&] { ops->dot_rows(b_rows, 1, f, 8, 2, 8, to, 2, false); }).empty()) << isa;
    KTS_EXPECT(!broken_by([&] { ops->dot_rows(b_rows, 2, f, 8, 2, 8, to, 2, false); }).empty()) << isa;
    KTS_EXPECT(!broken_by([&] { ops->dot_rows(b_rows, 1, f, 7, 2, 8, to, 2, false); }).empty()) << isa;
    KTS_EXPECT(broken_by([&] { ops->axpy_factor(f, 1, 1, 2, f_rows, 0, 1, to, 9, 9, false); }).empty()) << isa;
    KTS_EXPECT(!broken_by([&] { ops->axpy_factor(f, 1, 1, 2, f_rows, 0, 2, to, 9, 9, false); }).empty()) << isa;
    KTS_EXPECT(!broken_by([&] { ops->axpy_rows(f, 1, 1, 2, b_rows, 0, 1, to, 8, 9, false); }).empty()) << isa;
    KTS_EXPECT(!broken_by([&] { ops->transpose(f, 3, 2, 4, to, 2); }).empty()) << isa;
    KTS_EXPECT(!broken_by([&] { ops->quantize_row(nullptr, 4, q); }).empty()) << isa;
    KTS_EXPECT(!broken_by([&] { ops->mask_bf16({0, 0, -1}, 0, b, 4, b_out); }).empty()) << isa;
    KTS_EXPECT(!broken_by([&] { ops->masked_add({0, 0, 1}, -1, f, 4, to); }).empty()) << isa;
  }
  for (const QuantOps* ops : {&scalar::kQuantOps, &avx2::kQuantOps}) {
    if ((detect_isa() & ops->isa) == 0) continue;
    KTS_EXPECT(!broken_by([&] { ops->int4(b, 129, 0x3f80, q); }).empty());
    KTS_EXPECT(!broken_by([&] { ops->int4(b, 4, 0, q); }).empty());
    KTS_EXPECT(!broken_by([&] { ops->round_int8(b, -4, 1.0f, q); }).empty());
    KTS_EXPECT(!broken_by([&] { ops->largest(nullptr, 4); }).empty());
  }
}

}  // namespace kts::test
