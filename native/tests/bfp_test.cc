// GEMV in block floating point (arch/gemv_bfp_inl.h), bit by bit against its definition: rows of many magnitudes, zeros,
// numbers below the least exponent, infinity.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "kts/gemm.h"
#include "rows_problem.h"

namespace kts::test {
namespace {

constexpr int64_t kRows = 4, kN = 70, kK = 2200;

bool is_bfp(const KernelRow& row) { return row.rows == Rows::kBfp16; }

// Every block of 32 gets a size and a spread of its own.
void fill_rows(std::vector<bf16_t>& a, Random& random) {
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t b = 0; b * 32 < kK; ++b) {
      const int size = random.integer(-30, 30), spread = static_cast<int>(b % 5) * 4;
      for (int64_t j = b * 32; j < min_i64(kK, b * 32 + 32); ++j) {
        float x = std::ldexp(random.real(), size - random.integer(0, spread));
        if (b % 7 == 3) x = 0.0f;
        if (b % 11 == 5) x = std::ldexp(x, -110 - size);
        a[static_cast<size_t>(i * kK + j)] = f32_to_bf16(x);
      }
    }
}

// The definition, for weights q of one output channel with a scale per block (1 for int8).
float bfp_dot(const bf16_t* x, const std::vector<int>& q, const std::vector<float>& scales) {
  float sum = 0.0f;
  for (size_t b = 0; b * 32 < q.size(); ++b) {
    const size_t begin = b * 32, end = std::min(q.size(), begin + 32);
    int exponent = 15 - 127;
    for (size_t j = begin; j < end; ++j) exponent = std::max(exponent, (x[j] >> 7 & 0xff) - 127);
    if (exponent == 128) return std::nanf("");
    int64_t terms = 0;
    for (size_t j = begin; j < end; ++j)
      terms += static_cast<int64_t>(std::nearbyint(std::ldexp(static_cast<double>(bf16_to_f32(x[j])), 14 - exponent))) *
               q[j];
    sum = std::fmaf(static_cast<float>(terms), std::ldexp(scales[b], exponent - 14), sum);
  }
  return sum;
}

std::vector<float> expected(Problem& problem, WeightFormat format) {
  const PackedMatrix w = problem.w.matrix();
  std::vector<float> c(static_cast<size_t>(kRows * kN));
  for (int64_t n = 0; n < kN; ++n) {
    std::vector<float> scales;
    std::vector<int> q;
    for (int64_t b = 0; b * 32 < kK; ++b)
      scales.push_back(
          format.kind == Format::kInt8
              ? 1.0f
              : bf16_to_f32(w.int4_scales()[(n / 32 * w.k_groups() + b * 32 / format.group) * 32 + n % 32]));
    for (int64_t k = 0; k < kK; ++k)
      q.push_back(static_cast<int>(problem.w.value(n, k) / scales[static_cast<size_t>(k / 32)]));
    for (int64_t i = 0; i < kRows; ++i)
      c[static_cast<size_t>(i * kN + n)] =
          bfp_dot(problem.forward_a.data() + i * kK, q, scales) * problem.w.scale[static_cast<size_t>(n)];
  }
  return c;
}

}  // namespace

KTS_TEST(block_floating_point_gemv_has_the_bits_of_its_definition) {
  for (const KernelRow& row : kernel_table()) {
    if (!is_bfp(row) || (detect_isa() & row.isa) == 0) continue;
    for (const int group : {32, 64, 128}) {
      if (row.format == Format::kInt8 && group != 32) continue;
      const WeightFormat format{row.format, row.format == Format::kInt8 ? 0 : group};
      Random random(static_cast<uint64_t>(group));
      Problem problem(format, {kRows, kN, kK}, random, Values::kReals);
      fill_rows(problem.forward_a, random);
      problem.forward_a[2 * kK + 777] = 0x7f80;  // infinity
      const std::vector<float> want = expected(problem, format);
      for (int64_t m = 1; m <= kRows; ++m) {
        int64_t ldc = 0;
        const std::vector<float> got = problem.run(row, false, &ldc, kRows - m, m);
        for (int64_t i = 0; i < m; ++i)
          for (int64_t n = 0; n < kN; ++n) {
            const float w = want[static_cast<size_t>((kRows - m + i) * kN + n)],
                        g = got[static_cast<size_t>(i * ldc + n)];
            KTS_EXPECT(w == g || (std::isnan(w) && std::isnan(g)))
                << row.name << " group=" << group << " m=" << m << " [" << i << ", " << n << "]: " << g << " != " << w;
          }
      }
    }
  }
}

}  // namespace kts::test
