// Every row operation against plain loops: small integers, whose sums are exact in f32, so results must be equal; tails;
// extremes; NaN.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "kts/elementwise.h"

namespace kts::test {
namespace {

struct Shape {
  int64_t m, n, k;
};

bool runs_here(Isa isa) { return (detect_isa() & isa) != 0; }

}  // namespace

namespace {

const RowOps* all_ops[] = {&scalar::kRowOps, &avx2::kRowOps, &avx512::kRowOps};

std::vector<bf16_t> random_bf16(Random& random, int64_t count, bool integers) {
  std::vector<bf16_t> v(static_cast<size_t>(count));
  for (bf16_t& x : v) x = f32_to_bf16(integers ? static_cast<float>(random.integer(-8, 8)) : 3.0f * random.real());
  return v;
}

}  // namespace

KTS_TEST(dot_rows_is_exact_on_small_integers) {
  for (const RowOps* ops : all_ops) {
    if (!runs_here(ops->isa)) continue;
    for (const Shape& s : {Shape{1, 1, 1}, {3, 5, 7}, {4, 4, 16}, {5, 8, 33}, {9, 13, 100}, {2, 256, 31}}) {
      Random random(7);
      const auto a = random_bf16(random, s.m * s.k, true), b = random_bf16(random, s.n * (s.k + 3), true);
      std::vector<const bf16_t*> rows;
      for (int64_t i = 0; i < s.m; ++i) rows.push_back(a.data() + i * s.k);
      std::vector<float> c(static_cast<size_t>(s.m * s.n), 2.0f);
      ops->dot_rows(rows.data(), s.m, b.data(), s.k + 3, s.n, s.k, c.data(), s.n, true);
      for (int64_t i = 0; i < s.m; ++i)
        for (int64_t j = 0; j < s.n; ++j) {
          float want = 2.0f;
          for (int64_t t = 0; t < s.k; ++t)
            want += bf16_to_f32(a[static_cast<size_t>(i * s.k + t)]) *
                    bf16_to_f32(b[static_cast<size_t>(j * (s.k + 3) + t)]);
          KTS_EXPECT(c[static_cast<size_t>(i * s.n + j)] == want)
              << isa_name(ops->isa) << " m=" << s.m << " n=" << s.n << " k=" << s.k;
        }
    }
  }
}

KTS_TEST(axpy_rows_is_exact_on_small_integers_and_stays_inside) {
  for (const RowOps* ops : all_ops) {
    if (!runs_here(ops->isa)) continue;
    for (const Shape& s :
         {Shape{1, 1, 1}, {3, 5, 7}, {4, 64, 16}, {5, 67, 9}, {9, 130, 21}, {256, 31, 2}}) {  // rows, cols, terms
      for (const bool transposed : {false, true}) {
        Random random(8);
        const auto q = random_bf16(random, s.k * (s.n + 2), true);
        std::vector<float> l(static_cast<size_t>(s.m * s.k));
        for (float& v : l) v = static_cast<float>(random.integer(-8, 8));
        std::vector<const bf16_t*> rows;
        for (int64_t t = 0; t < s.k; ++t) rows.push_back(q.data() + t * (s.n + 2));
        const int64_t l_row = transposed ? 1 : s.k, l_term = transposed ? s.m : 1, ldc = s.n + 1;
        std::vector<float> c(static_cast<size_t>(s.m * ldc), 5.0f);
        ops->axpy_rows(l.data(), l_row, l_term, s.m, rows.data(), 2, s.k, c.data(), ldc, s.n);
        for (int64_t i = 0; i < s.m; ++i)
          for (int64_t j = 0; j < ldc; ++j) {
            float want = 5.0f;
            for (int64_t t = 0; j < s.n && t < s.k; ++t)
              want += l[static_cast<size_t>(i * l_row + t * l_term)] * bf16_to_f32(rows[static_cast<size_t>(t)][2 + j]);
            KTS_EXPECT(c[static_cast<size_t>(i * ldc + j)] == want)
                << isa_name(ops->isa) << " rows=" << s.m << " cols=" << s.n << " terms=" << s.k << " at " << i << ", "
                << j;
          }
      }
    }
  }
}

KTS_TEST(bf16_rounding_is_to_nearest_even_and_keeps_nan_and_infinity) {
  std::vector<float> values = {0.0f,
                               -0.0f,
                               1.0f,
                               1.00390625f,
                               1.01171875f,
                               1.00390636f,
                               3.3895314e38f,
                               -3.4028235e38f,
                               1e-45f,
                               std::numeric_limits<float>::infinity(),
                               -std::numeric_limits<float>::infinity(),
                               std::nanf("")};
  for (uint32_t payload : {0x7f800001u, 0xffffffffu, 0x7fbfffffu}) {
    float nan;
    std::memcpy(&nan, &payload, sizeof(nan));
    values.push_back(nan);
  }
  Random random(9);
  while (values.size() < 77) values.push_back(random.real() * 100.0f);
  for (const RowOps* ops : all_ops) {
    if (!runs_here(ops->isa)) continue;
    std::vector<bf16_t> got(values.size() + 1, 0x1234);
    ops->to_bf16(values.data(), static_cast<int64_t>(values.size()), got.data());
    for (size_t i = 0; i < values.size(); ++i) {
      if (std::isnan(values[i])) {
        KTS_EXPECT(std::isnan(bf16_to_f32(got[i]))) << isa_name(ops->isa) << " NaN " << i;
      } else {
        KTS_EXPECT(got[i] == f32_to_bf16(values[i])) << isa_name(ops->isa) << " value " << values[i];
      }
    }
    KTS_EXPECT(got.back() == 0x1234) << isa_name(ops->isa) << " wrote past the end";
  }
}

KTS_TEST(silu_matches_double_precision_and_carries_nan) {
  std::vector<float> g;
  for (float v = -100.0f; v <= 100.0f; v += 0.37f) g.push_back(v);
  g.push_back(std::nanf(""));
  const int64_t cols = static_cast<int64_t>(g.size());
  for (const RowOps* ops : all_ops) {
    if (!runs_here(ops->isa)) continue;
    std::vector<float> u(g.size(), 1.0f), dh(g.size(), 1.0f);
    std::vector<bf16_t> gb(g.size()), ub(g.size()), h(g.size()), dg(g.size()), du(g.size()), h2(g.size());
    ops->glu[0].forward(g.data(), u.data(), cols, gb.data(), ub.data(), h.data());
    ops->glu[0].backward(gb.data(), ub.data(), dh.data(), 2.0f, cols, dg.data(), du.data(), h2.data());
    for (size_t i = 0; i + 1 < g.size(); ++i) {
      const double x = bf16_to_f32(gb[i]), s = 1.0 / (1.0 + std::exp(-x));
      const auto near = [](bf16_t got, double want) {
        return std::fabs(bf16_to_f32(got) - want) <= std::fabs(want) / 256 * 1.001 + 1e-30;
      };
      KTS_EXPECT(near(h[i], x * s)) << isa_name(ops->isa) << " silu(" << x << ") = " << bf16_to_f32(h[i]);
      KTS_EXPECT(near(du[i], 2 * x * s)) << isa_name(ops->isa) << " du at " << x;
      if (std::fabs(x + 1.278) > 0.1) {
        KTS_EXPECT(near(dg[i], 2 * s * (1 + x * (1 - s)))) << isa_name(ops->isa) << " slope at " << x;
      }
      KTS_EXPECT(h[i] == h2[i]) << isa_name(ops->isa) << " h differs between forward and backward at " << x;
    }
    KTS_EXPECT(std::isnan(bf16_to_f32(h.back())) && std::isnan(bf16_to_f32(dg.back()))) << isa_name(ops->isa);
  }
}

KTS_TEST(dropout_masks_are_equal_on_every_isa) {
  Random random(10);
  const auto src = random_bf16(random, 101, false);
  const RowMask mask{0x12345678u, 0x9abcdef0u, 5000000};
  std::vector<bf16_t> want(101);
  scalar::kRowOps.mask_bf16(mask, 11, src.data(), 101, want.data());
  int kept = 0;
  for (const bf16_t v : want) kept += v != 0;
  KTS_EXPECT(kept > 40 && kept < 101) << kept;
  for (const RowOps* ops : all_ops) {
    if (!runs_here(ops->isa)) continue;
    std::vector<bf16_t> got(101);
    ops->mask_bf16(mask, 11, src.data(), 101, got.data());
    KTS_EXPECT(got == want) << isa_name(ops->isa);
    std::vector<float> wide(101), sum(101, 1.0f);
    for (size_t i = 0; i < 101; ++i) wide[i] = bf16_to_f32(src[i]);
    ops->masked_add(mask, 11, wide.data(), 101, sum.data());
    for (size_t i = 0; i < 101; ++i) KTS_EXPECT(sum[i] == 1.0f + bf16_to_f32(want[i])) << isa_name(ops->isa);
  }
}

}  // namespace kts::test
