// int8 rows where sums are largest and longest: several k blocks, all values at the ends of their range, the limit of k.
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "kts/gemm.h"
#include "packed_problem.h"

namespace kts::test {
namespace {

// Rows of `high` and `low` in turns; scales of one.
struct Rows8 {
  std::vector<std::vector<int8_t>> rows;
  std::vector<const int8_t*> pointers;
  std::vector<float> scales;

  Rows8(int64_t m, int64_t k, int high, int low) : rows(static_cast<size_t>(m)), scales(static_cast<size_t>(m), 1.0f) {
    for (size_t i = 0; i < rows.size(); ++i) {
      rows[i].assign(static_cast<size_t>(align_up(k, 64)), 0);
      for (int64_t j = 0; j < k; ++j) rows[i][static_cast<size_t>(j)] = static_cast<int8_t>(i % 2 == 0 ? high : low);
      pointers.push_back(rows[i].data());
    }
  }
};

template <class Fn>
void for_int8_rows(Fn&& fn) {
  for (const KernelRow& row : kernel_table())
    if ((detect_isa() & row.isa) != 0 && row.rows == Rows::kInt8) fn(row);
}

}  // namespace

KTS_TEST(int8_sums_are_exact_at_the_ends_of_the_range) {
  for_int8_rows([](const KernelRow& row) {
    if (row.isa == kScalar) return;
    for (const int64_t k : {int64_t{9000}, int64_t{32768}}) {
      const int64_t n = 20, m = 2;  // few: an emulated instruction is slow
      const WeightFormat format{row.format, row.format == Format::kInt4 ? 128 : 0};
      Bytes memory(packed_bytes(format, n, k), row.format == Format::kInt4 ? 0x88 : 0);
      const PackedMatrix w = packed_view(format, n, k, memory.data());
      const bool is_int8 = row.format == Format::kInt8;
      const std::vector<bf16_t> ones(static_cast<size_t>(n * k), f32_to_bf16(is_int8 ? 127.0f : -8.0f));
      pack_panels(ones.data(), k, w, 0, w.n_panels());
      Rows8 a(m, k, 127, -127);
      std::vector<float> c(static_cast<size_t>(m * kPanel), -1.0f);
      Bytes scratch(kGemmScratchBytes, 0xff);
      GemmTask task;
      task.m = m;
      task.w = &w;
      task.panel_end = w.n_panels();
      task.c = c.data();
      task.ldc = kPanel;
      task.scratch = scratch.data();
      task.q_rows = a.pointers.data();
      task.q_scales = a.scales.data();
      row.run(task);
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < kPanel; ++j) {
          const double sum = static_cast<double>(k) * 127 * (is_int8 ? 127 : -8) * (i % 2 == 0 ? 1 : -1);
          const double want = j < n ? sum : 0.0, got = c[static_cast<size_t>(i * kPanel + j)];
          // float(sum) of int8 is rounded once; sums of 128 products of int4 stay exact in f32.
          KTS_EXPECT(is_int8 ? got == static_cast<double>(static_cast<float>(want)) : got == want)
              << row.name << " k=" << k << " [" << i << ", " << j << "]: " << got << " != " << want;
        }
    }
  });
}

KTS_TEST(int8_rows_refuse_sums_beyond_int32) {
  for_int8_rows([](const KernelRow& row) {
    if (row.isa == kScalar || row.isa == kAmxInt8) return;
    const int64_t k = 131073;
    const WeightFormat format{row.format, row.format == Format::kInt4 ? 32 : 0};
    Bytes memory(packed_bytes(format, 1, k), row.format == Format::kInt4 ? 0x88 : 0);
    const PackedMatrix w = packed_view(format, 1, k, memory.data());
    Rows8 a(1, k, 1, 1);
    std::vector<float> c(kPanel);
    Bytes scratch(kGemmScratchBytes, 0);
    GemmTask task;
    task.m = 1;
    task.w = &w;
    task.panel_end = 1;
    task.c = c.data();
    task.ldc = kPanel;
    task.scratch = scratch.data();
    task.q_rows = a.pointers.data();
    task.q_scales = a.scales.data();
    std::string message;
    try {
      row.run(task);
    } catch (const std::invalid_argument& error) {
      message = error.what();
    }
    KTS_EXPECT(message.find("131072") != std::string::npos) << row.name << ": " << message;
  });
}

}  // namespace kts::test
