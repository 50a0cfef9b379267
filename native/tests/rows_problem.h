// One product of the kernel table with all its operands, and its result in double precision.
#pragma once
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "kts/gemm.h"
#include "packed_problem.h"

namespace kts::test {

struct Shape {
  int64_t m, n, k;
};

inline bool has_bf16_operands(const KernelRow& row) {
  return std::strstr(row.name, "_amx") != nullptr || std::strstr(row.name, "_avx512bf16") != nullptr;
}

// Random operands of both directions and both kinds of rows.
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

  // Runs a row over all panels, kMaxTaskPanels at a time, and returns c [m, padded columns]. weights: those of w, if they
  // lie elsewhere.
  std::vector<float> run(const KernelRow& row, bool accumulate, int64_t* ldc, int64_t first = 0, int64_t count = -1,
                         const PackedMatrix* weights = nullptr) {
    const bool forward = row.direction == Direction::kForward;
    const int64_t cols = forward ? w.n : w.k, inner = forward ? w.k : w.n;
    const std::vector<bf16_t>& a = forward ? forward_a : grad_a;
    const PackedMatrix matrix = weights != nullptr ? *weights : w.matrix();
    const int64_t rows_here = count < 0 ? m : count;
    *ldc = align_up(cols, kPanel);
    std::vector<float> c(static_cast<size_t>(rows_here * *ldc), accumulate ? 3.0f : std::nanf(""));
    // Every row in memory of its own, which ends with it: reads beyond it are the sanitizer's to find. NaN before it.
    const int64_t offset = row.rows == Rows::kInt8 ? 0 : 3;
    std::vector<std::vector<bf16_t>> own_rows;
    std::vector<const bf16_t*> rows;
    std::vector<const int8_t*> q;
    for (int64_t i = first; i < first + rows_here; ++i) {
      own_rows.emplace_back(static_cast<size_t>(offset), bf16_t{0x7fc0});
      own_rows.back().insert(own_rows.back().end(), a.begin() + i * inner, a.begin() + (i + 1) * inner);
      q.push_back(q_rows.data() + i * align_up(w.k, 64));
    }
    for (const std::vector<bf16_t>& own : own_rows) rows.push_back(own.data());
    Bytes scratch(kGemmScratchBytes, 0xff);  // NaN
    const int64_t panels = ceil_div(cols, kPanel);
    for (int64_t p = 0; p < panels; p += kMaxTaskPanels) {
      GemmTask task{
          rows.data(), rows_here,  &matrix,       p, min_i64(p + kMaxTaskPanels, panels), c.data() + p * kPanel,
          *ldc,        accumulate, scratch.data()};
      task.a_offset = offset;
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
      if (!forward && w.format.kind == Format::kInt8) {
        const float scaled = static_cast<float>(a) * w.scale[static_cast<size_t>(t)];
        a = has_bf16_operands(row) ? round_to_bf16(scaled) : scaled;
      }
      float weight = forward ? w.value(col, t) : w.value(t, col);
      if (w.format.any_scale && has_bf16_operands(row) && row.rows == Rows::kBf16) weight = round_to_bf16(weight);
      const double term = a * weight * column_scale;
      sum += term;
      *mass += std::fabs(term);
    }
    return sum;
  }
};

inline bool may_accumulate(const KernelRow& row) {
  return row.direction == Direction::kInputGrad || row.format == Format::kBf16;
}

// Element by element: equal on small integers, else within the bound of an f32 sum.
inline void check_row(const KernelRow& row, WeightFormat format, const Shape& shape, Values values, bool accumulate) {
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

}  // namespace kts::test
