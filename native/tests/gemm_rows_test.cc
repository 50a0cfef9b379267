// Every row of the kernel table against double precision: small integers, whose sums are exact in f32, so results must
// be equal; random reals against the bound of an f32 sum; all tails; NaN. Rows of int8 must equal the scalar row's bits.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "kts/gemm.h"
#include "rows_problem.h"

namespace kts::test {
namespace {

// Sides that differ and are no multiples of blocks, tiles or panels; every m up to two of the largest block; more than
// one block of the sum.
std::vector<Shape> shapes() {
  std::vector<Shape> all = {{1, 1, 1},     {2, 15, 31},   {3, 17, 33},   {5, 33, 257},  {7, 64, 300},
                            {13, 100, 47}, {24, 31, 5},   {25, 47, 64},  {12, 300, 31}, {6, 513, 16},
                            {200, 40, 70}, {17, 70, 129}, {33, 66, 200}, {1, 40, 1300}, {4, 1100, 97}};
  for (int64_t m = 1; m <= 34; ++m) all.push_back({m, 37, 45});
  return all;
}

bool runs_here(const KernelRow& row) { return (detect_isa() & row.isa) != 0; }

// With whole blocks along k.
Shape fitting(Shape shape, WeightFormat format) {
  if (is_block_format(format.kind)) shape.k = align_up(shape.k, block_type_info(format.type).block);
  return shape;
}

// Calls fn(row, format, shape) for what can run here.
template <class Fn>
void for_rows(Fn&& fn) {
  for (const KernelRow& row : kernel_table()) {
    if (!runs_here(row)) continue;
    for (const WeightFormat format : formats_of(row.format))
      for (const Shape& shape : shapes())
        if (row.max_m == 0 || shape.m <= row.max_m) fn(row, format, fitting(shape, format));
  }
}

}  // namespace

KTS_TEST(kernel_rows_are_exact_on_small_integers) {
  for_rows([](const KernelRow& row, WeightFormat format, const Shape& shape) {
    check_row(row, format, shape, Values::kSmallIntegers, may_accumulate(row) && shape.m % 2 == 0);
  });
}

KTS_TEST(kernel_rows_meet_the_bound_on_reals) {
  for_rows([](const KernelRow& row, WeightFormat format, const Shape& shape) {
    check_row(row, format, shape, Values::kReals, may_accumulate(row) && shape.m % 2 == 1);
  });
}

// What loads INT4 checkpoints as they are, in few shapes: this case alone runs in minutes on the emulated PC.
KTS_TEST(rows_of_stored_int4_meet_the_bound) {
  for (const KernelRow& row : kernel_table()) {
    if (!runs_here(row) || row.format != Format::kInt4) continue;
    for (const Shape& shape : {Shape{1, 33, 64}, {4, 40, 257}, {33, 66, 200}}) {
      if (row.max_m != 0 && shape.m > row.max_m) continue;
      check_row(row, {Format::kInt4, 32, BlockType::kNone, true}, shape, Values::kSmallIntegers, false);
      check_row(row, {Format::kInt4, 32, BlockType::kNone, true}, shape, Values::kReals, false);
    }
  }
}

// The same of the types that GGUF files hold.
KTS_TEST(rows_of_block_types_meet_the_bound) {
  for (const KernelRow& row : kernel_table()) {
    if (!runs_here(row) || row.format < Format::kF16) continue;
    for (const WeightFormat format : formats_of(row.format))
      for (const Shape& shape : {Shape{1, 33, 64}, {4, 40, 257}, {19, 66, 200}})
        if (row.max_m == 0 || shape.m <= row.max_m)
          check_row(row, format, fitting(shape, format), Values::kReals, may_accumulate(row));
  }
}

KTS_TEST(rows_of_int8_equal_the_scalar_bits) {
  for_rows([](const KernelRow& row, WeightFormat format, const Shape& shape) {
    if (row.rows != Rows::kInt8) return;
    Random random(static_cast<uint64_t>(shape.m * 31 + shape.n * 7 + shape.k));
    Problem problem(format, shape, random, Values::kReals);
    int64_t ldc = 0;
    const KernelRow& reference = select_gemm({row.format, row.rows, row.direction, shape.m, shape.n, shape.k}, kScalar);
    const std::vector<float> want = problem.run(reference, false, &ldc), got = problem.run(row, false, &ldc);
    KTS_EXPECT(std::memcmp(want.data(), got.data(), want.size() * sizeof(float)) == 0)
        << row.name << " group=" << format.group << " m=" << shape.m << " n=" << shape.n << " k=" << shape.k;
  });
}

KTS_TEST(rows_of_absent_isas_are_named) {
  std::string names;
  for (const KernelRow& row : kernel_table())
    if (!runs_here(row)) names += std::string(names.empty() ? "" : ", ") + row.name;
  if (!names.empty()) KTS_SKIP("this CPU cannot run " + names);
}

KTS_TEST(kernels_carry_nan_to_their_row_only) {
  for (const KernelRow& row : kernel_table()) {
    if (!runs_here(row) || row.rows == Rows::kInt8) continue;
    for (const WeightFormat format : formats_of(row.format)) {
      const int64_t m = row.max_m == 0 ? 14 : row.max_m, bad = min_i64(3, m - 1);
      Random random(5);
      const Shape shape = fitting({m, 40, 50}, format);
      Problem problem(format, shape, random, Values::kReals);
      problem.forward_a[static_cast<size_t>(bad * shape.k + 7)] = 0x7fc0;
      problem.grad_a[static_cast<size_t>(bad * shape.n + 7)] = 0x7fc0;
      int64_t ldc = 0;
      const std::vector<float> c = problem.run(row, false, &ldc);
      const int64_t cols = row.direction == Direction::kForward ? shape.n : shape.k;
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < cols; ++j)
          KTS_EXPECT(std::isnan(c[static_cast<size_t>(i * ldc + j)]) == (i == bad)) << row.name << " row " << i;
    }
  }
}

KTS_TEST(a_row_does_not_depend_on_its_neighbours) {
  for (const KernelRow& row : kernel_table()) {
    if (!runs_here(row)) continue;
    for (const WeightFormat format : formats_of(row.format)) {
      const int64_t m = row.max_m == 0 ? 29 : row.max_m;
      Random random(6);
      Problem problem(format, fitting({m, 70, 600}, format), random, Values::kReals);
      int64_t ldc = 0;
      const std::vector<float> all = problem.run(row, false, &ldc);
      for (const int64_t i : {int64_t{0}, m / 2, m - 1}) {
        const std::vector<float> single = problem.run(row, false, &ldc, i, 1);
        KTS_EXPECT(std::memcmp(single.data(), all.data() + i * ldc, static_cast<size_t>(ldc) * sizeof(float)) == 0)
            << row.name << " row " << i;
      }
    }
  }
}

// The f32 engine sums in one order whatever kernel it takes: results do not depend on how many rows meet in a batch.
KTS_TEST(kernels_of_bf16_rows_and_f32_sums_agree_bit_by_bit_within_an_isa) {
  for (const KernelRow& row : kernel_table()) {
    if (!runs_here(row) || row.rows != Rows::kBf16 || row.max_m == 0 || row.isa > kAvx512) continue;
    for (const WeightFormat format : formats_of(row.format)) {
      Random random(11);
      Problem problem(format, fitting({row.max_m, 70, 600}, format), random, Values::kReals);
      int64_t ldc = 0;
      const KernelRow& wide =
          select_gemm({row.format, row.rows, row.direction, 512, problem.w.n, problem.w.k}, row.isa);
      const std::vector<float> want = problem.run(wide, false, &ldc), got = problem.run(row, false, &ldc);
      KTS_EXPECT(std::memcmp(want.data(), got.data(), want.size() * sizeof(float)) == 0)
          << row.name << " " << wide.name;
    }
  }
}

KTS_TEST(small_rows_take_no_more_than_the_scratch) {
  for (const KernelRow& row : kernel_table())
    KTS_EXPECT(192 % row.block_m == 0) << row.name << ": kRowBlock must be whole blocks";
}

}  // namespace kts::test
