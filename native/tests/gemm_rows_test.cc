// Every row of the kernel table against double precision: small integers, whose sums are exact in f32, so results must
// be equal; random reals against the bound of an f32 sum; all tails; NaN. Rows of int8 must equal the scalar row's bits.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "kts/gemm.h"
#include "packed_problem.h"

namespace kts::test {
namespace {

struct Shape {
  int64_t m, n, k;
};

// Sides that differ and are no multiples of blocks, tiles or panels; every m up to two of the largest block; more than
// one block of the sum.
std::vector<Shape> shapes() {
  std::vector<Shape> all = {{1, 1, 1},     {2, 15, 31},   {3, 17, 33},   {5, 33, 257},  {7, 64, 300},
                            {13, 100, 47}, {24, 31, 5},   {25, 47, 64},  {12, 300, 31}, {6, 513, 16},
                            {200, 40, 70}, {17, 70, 129}, {33, 66, 200}, {1, 40, 1300}, {4, 1100, 97}};
  for (int64_t m = 1; m <= 34; ++m) all.push_back({m, 37, 45});
  return all;
}

struct Problem {
  PackedProblem w;
  int64_t m;
  std::vector<bf16_t> forward_a, grad_a;  // [m, k], [m, n]
  std::vector<int8_t> q_rows;             // [m, align_up(k, 64)]
  std::vector<float> q_scales;

  Problem(WeightFormat format, const Shape& s, Random& random, Values values)
      : w(format, s.n, s.k, values, random), m(s.m) {
    const auto fill = [&](std::vector<bf16_t>& v, int64_t count) {
      v.resize(static_cast<size_t>(count));
      for (bf16_t& x : v)
        x = f32_to_bf16(values == Values::kReals ? random.real() : static_cast<float>(random.integer(-8, 8)));
    };
    fill(forward_a, s.m * s.k);
    fill(grad_a, s.m * s.n);
    const int64_t stride = align_up(s.k, 64);
    q_rows.assign(static_cast<size_t>(s.m * stride), 0);
    for (int64_t i = 0; i < s.m; ++i) {
      for (int64_t j = 0; j < s.k; ++j)
        q_rows[static_cast<size_t>(i * stride + j)] = static_cast<int8_t>(random.integer(-127, 127));
      q_scales.push_back(values == Values::kReals ? 0.02f + 0.01f * random.real() : 0.5f);
    }
  }

  // Runs a row over all panels, kMaxTaskPanels at a time, and returns c [m, padded columns].
  std::vector<float> run(const KernelRow& row, bool accumulate, int64_t* ldc, int64_t first = 0, int64_t count = -1) {
    const bool forward = row.direction == Direction::kForward;
    const int64_t cols = forward ? w.n : w.k, inner = forward ? w.k : w.n;
    const std::vector<bf16_t>& a = forward ? forward_a : grad_a;
    const PackedMatrix matrix = w.matrix();
    const int64_t rows_here = count < 0 ? m : count;
    *ldc = align_up(cols, kPanel);
    std::vector<float> c(static_cast<size_t>(rows_here * *ldc), accumulate ? 3.0f : std::nanf(""));
    // Every row in memory of its own, which ends with it: reads beyond it are the sanitizer's to find.
    std::vector<std::vector<bf16_t>> own_rows;
    std::vector<const bf16_t*> rows;
    std::vector<const int8_t*> q;
    for (int64_t i = first; i < first + rows_here; ++i) {
      own_rows.emplace_back(a.begin() + i * inner, a.begin() + (i + 1) * inner);
      q.push_back(q_rows.data() + i * align_up(w.k, 64));
    }
    for (const std::vector<bf16_t>& own : own_rows) rows.push_back(own.data());
    Bytes scratch(kGemmScratchBytes, 0xff);  // NaN
    const int64_t panels = ceil_div(cols, kPanel);
    for (int64_t p = 0; p < panels; p += kMaxTaskPanels) {
      GemmTask task{
          rows.data(), rows_here,  &matrix,       p, min_i64(p + kMaxTaskPanels, panels), c.data() + p * kPanel,
          *ldc,        accumulate, scratch.data()};
      if (row.rows == Rows::kInt8) task.q_rows = q.data(), task.q_scales = q_scales.data() + first;
      row.run(task);
    }
    return c;
  }

  double expected(const KernelRow& row, int64_t i, int64_t col, double* mass) const {
    double sum = 0;
    *mass = 0;
    const bool forward = row.direction == Direction::kForward;
    const int64_t inner = forward ? w.k : w.n;
    const double column_scale = forward ? w.scale[static_cast<size_t>(col)] : 1.0;
    for (int64_t t = 0; t < inner; ++t) {
      double a = bf16_to_f32((forward ? forward_a : grad_a)[static_cast<size_t>(i * inner + t)]);
      if (row.rows == Rows::kInt8)
        a = q_rows[static_cast<size_t>(i * align_up(w.k, 64) + t)] *
            static_cast<double>(q_scales[static_cast<size_t>(i)]);
      if (!forward && w.format.kind == Format::kInt8)
        a = round_to_bf16(static_cast<float>(a) * w.scale[static_cast<size_t>(t)]);
      const double term = a * (forward ? w.value(col, t) : w.value(t, col)) * column_scale;
      sum += term;
      *mass += std::fabs(term);
    }
    return sum;
  }
};

bool runs_here(const KernelRow& row) { return (detect_isa() & row.isa) != 0; }

std::vector<WeightFormat> formats_of(const KernelRow& row) {
  if (row.format != Format::kInt4) return {{row.format, 0}};
  return {{Format::kInt4, 32}, {Format::kInt4, 64}, {Format::kInt4, 128}};
}

// Calls fn(row, format, shape) for what can run here.
template <class Fn>
void for_rows(Fn&& fn) {
  for (const KernelRow& row : kernel_table()) {
    if (!runs_here(row)) continue;
    for (const WeightFormat format : formats_of(row))
      for (const Shape& shape : shapes())
        if (row.max_m == 0 || shape.m <= row.max_m) fn(row, format, shape);
  }
}

bool may_accumulate(const KernelRow& row) {
  return row.direction == Direction::kInputGrad || row.format == Format::kBf16;
}

void check_row(const KernelRow& row, WeightFormat format, const Shape& shape, Values values, bool accumulate) {
  Random random(static_cast<uint64_t>(shape.m * 1000003 + shape.n * 1009 + shape.k));
  Problem problem(format, shape, random, values);
  int64_t ldc = 0;
  const std::vector<float> c = problem.run(row, accumulate, &ldc);
  const int64_t cols = row.direction == Direction::kForward ? shape.n : shape.k;
  const int64_t terms = row.direction == Direction::kForward ? shape.k : shape.n;
  for (int64_t i = 0; i < shape.m; ++i)
    for (int64_t j = 0; j < ldc; ++j) {
      double mass = 0;
      double want = accumulate ? 3.0 : 0.0;
      if (j < cols) want += problem.expected(row, i, j, &mass);
      const double got = c[static_cast<size_t>(i * ldc + j)];
      const double bound = values == Values::kSmallIntegers
                               ? 0.0
                               : 1.2e-7 * static_cast<double>(terms + 2) * (mass + (accumulate ? 3.0 : 0.0));
      KTS_EXPECT(std::fabs(got - want) <= bound)
          << row.name << " group=" << format.group << " m=" << shape.m << " n=" << shape.n << " k=" << shape.k
          << " at [" << i << ", " << j << "]: " << got << " != " << want;
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

KTS_TEST(rows_of_int8_equal_the_scalar_bits) {
  for_rows([](const KernelRow& row, WeightFormat format, const Shape& shape) {
    if (row.rows != Rows::kInt8) return;
    Random random(static_cast<uint64_t>(shape.m * 31 + shape.n * 7 + shape.k));
    Problem problem(format, shape, random, Values::kReals);
    int64_t ldc = 0;
    const KernelRow& reference = select_gemm(row.format, row.rows, row.direction, shape.m, kScalar);
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
    for (const WeightFormat format : formats_of(row)) {
      const int64_t m = row.max_m == 0 ? 14 : row.max_m, bad = min_i64(3, m - 1);
      Random random(5);
      Problem problem(format, {m, 40, 50}, random, Values::kReals);
      problem.forward_a[static_cast<size_t>(bad * 50 + 7)] = problem.grad_a[static_cast<size_t>(bad * 40 + 7)] = 0x7fc0;
      int64_t ldc = 0;
      const std::vector<float> c = problem.run(row, false, &ldc);
      const int64_t cols = row.direction == Direction::kForward ? 40 : 50;
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < cols; ++j)
          KTS_EXPECT(std::isnan(c[static_cast<size_t>(i * ldc + j)]) == (i == bad)) << row.name << " row " << i;
    }
  }
}

KTS_TEST(a_row_does_not_depend_on_its_neighbours) {
  for (const KernelRow& row : kernel_table()) {
    if (!runs_here(row)) continue;
    for (const WeightFormat format : formats_of(row)) {
      const int64_t m = row.max_m == 0 ? 29 : row.max_m;
      Random random(6);
      Problem problem(format, {m, 70, 600}, random, Values::kReals);
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
    for (const WeightFormat format : formats_of(row)) {
      Random random(11);
      Problem problem(format, {row.max_m, 70, 600}, random, Values::kReals);
      int64_t ldc = 0;
      const KernelRow& wide = select_gemm(row.format, row.rows, row.direction, 512, row.isa);
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
