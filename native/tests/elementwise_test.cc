// Every row operation against plain loops: small integers, whose sums are exact in f32, so results must be equal; tails;
// extremes; NaN.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "emulated.h"
#include "kts/tables.h"

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
    for (const Shape& s :
         {Shape{1, 1, 1}, {3, 5, 7}, {4, 4, 16}, {5, 8, 33}, {9, 13, 100}, {2, 256, 31}, {67, 7, 1100}}) {
      Random random(7);
      const auto a = random_bf16(random, s.m * s.k, true);
      std::vector<float> b(static_cast<size_t>(s.n * (s.k + 3)));
      for (float& v : b) v = static_cast<float>(random.integer(-8, 8));
      std::vector<const bf16_t*> rows;
      for (int64_t i = 0; i < s.m; ++i) rows.push_back(a.data() + i * s.k);
      std::vector<float> c(static_cast<size_t>(s.m * s.n), 2.0f);
      ops->dot_rows(rows.data(), s.m, b.data(), s.k + 3, s.n, s.k, c.data(), s.n, true);
      for (int64_t i = 0; i < s.m; ++i)
        for (int64_t j = 0; j < s.n; ++j) {
          float want = 2.0f;
          for (int64_t t = 0; t < s.k; ++t)
            want += bf16_to_f32(a[static_cast<size_t>(i * s.k + t)]) * b[static_cast<size_t>(j * (s.k + 3) + t)];
          KTS_EXPECT(c[static_cast<size_t>(i * s.n + j)] == want)
              << isa_name(ops->isa) << " m=" << s.m << " n=" << s.n << " k=" << s.k;
        }
    }
  }
}

KTS_TEST(axpy_rows_is_exact_on_small_integers_and_stays_inside) {
  for (const RowOps* ops : all_ops) {
    if (!runs_here(ops->isa)) continue;
    for (const Shape& s : {Shape{1, 1, 1},
                           {1, 150, 5},
                           {3, 5, 7},
                           {4, 64, 16},
                           {5, 67, 9},
                           {9, 130, 21},
                           {256, 31, 2},
                           {13, 70, 300},
                           {8, 40, 0}}) {  // rows, cols, terms
      for (const bool transposed : {false, true}) {
        Random random(8);
        const auto q = random_bf16(random, s.k * (s.n + 2), true);
        std::vector<float> l(static_cast<size_t>(s.m * s.k));
        for (float& v : l) v = static_cast<float>(random.integer(-8, 8));
        std::vector<const bf16_t*> rows;
        for (int64_t t = 0; t < s.k; ++t) rows.push_back(q.data() + t * (s.n + 2));
        const int64_t l_row = transposed ? 1 : s.k, l_term = transposed ? s.m : 1, ldc = s.n + 1;
        std::vector<float> c(static_cast<size_t>(s.m * ldc), 5.0f), written(c.size(), NAN);
        ops->axpy_rows(l.data(), l_row, l_term, s.m, rows.data(), 2, s.k, c.data(), ldc, s.n, true);
        ops->axpy_rows(l.data(), l_row, l_term, s.m, rows.data(), 2, s.k, written.data(), ldc, s.n, false);
        for (int64_t i = 0; i < s.m; ++i)
          for (int64_t j = 0; j < ldc; ++j) {
            float want = 5.0f;
            for (int64_t t = 0; j < s.n && t < s.k; ++t)
              want += l[static_cast<size_t>(i * l_row + t * l_term)] * bf16_to_f32(rows[static_cast<size_t>(t)][2 + j]);
            KTS_EXPECT(c[static_cast<size_t>(i * ldc + j)] == want)
                << isa_name(ops->isa) << " rows=" << s.m << " cols=" << s.n << " terms=" << s.k << " at " << i << ", "
                << j;
            const float alone = written[static_cast<size_t>(i * ldc + j)];
            KTS_EXPECT(j < s.n ? alone == want - 5.0f : std::isnan(alone))
                << isa_name(ops->isa) << " written: rows=" << s.m << " cols=" << s.n << " terms=" << s.k;
          }
      }
    }
  }
}

KTS_TEST(transpose_swaps_indices_and_stays_inside) {
  for (const RowOps* ops : all_ops) {
    if (!runs_here(ops->isa)) continue;
    for (const Shape& s : {Shape{1, 1, 0}, {16, 8, 0}, {32, 32, 0}, {31, 17, 0}, {40, 5, 0}, {3, 100, 0}}) {
      const int64_t from_stride = s.n + 3, to_stride = s.m + 2;
      std::vector<float> from(static_cast<size_t>(s.m * from_stride)), to(static_cast<size_t>(s.n * to_stride), -1.0f);
      for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<float>(i);
      ops->transpose(from.data(), from_stride, s.m, s.n, to.data(), to_stride);
      for (int64_t j = 0; j < s.n; ++j)
        for (int64_t i = 0; i < to_stride; ++i)
          KTS_EXPECT(to[static_cast<size_t>(j * to_stride + i)] ==
                     (i < s.m ? static_cast<float>(i * from_stride + j) : -1.0f))
              << isa_name(ops->isa) << " " << s.m << " x " << s.n << " at " << i << ", " << j;
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

KTS_TEST(f16_rounding_is_to_nearest_even_and_saturates) {
  const float values[] = {0.0f,     -0.0f,   1.0f,     1.00048828125f, 1.00146484375f, 65504.0f, 65519.0f,
                          -1e30f,   6.1e-5f, 3.1e-8f,  2.9e-8f,        -5.96e-8f,      1e-45f,   0.333333f,
                          INFINITY, 0.1f,    -2049.0f, 4097.5f,        6.097555e-5f,   1e-7f,    12345.678f};
  const f16_t known[] = {0x0000, 0x8000, 0x3c00, 0x3c00, 0x3c02, 0x7bff, 0x7bff};
  for (size_t i = 0; i < std::size(known); ++i) KTS_EXPECT(f32_to_f16(values[i]) == known[i]) << values[i];
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {  // every f16 number goes there and back
    const float value = f16_to_f32(static_cast<f16_t>(bits));
    if ((bits & 0x7c00u) != 0x7c00u) {
      KTS_EXPECT(f32_to_f16(value) == bits) << bits;
    }
  }
  KTS_EXPECT(std::isnan(f16_to_f32(f32_to_f16(std::nanf("")))));
  for (const RowOps* ops : all_ops) {
    if (!runs_here(ops->isa)) continue;
    std::vector<float> g(values, values + std::size(values)), u(g.size(), 1.0f);
    g.push_back(std::nanf("")), u.push_back(1.0f);
    std::vector<f16_t> got(g.size()), other(g.size());
    std::vector<bf16_t> h(g.size());
    ops->glu[0].forward({}, g.data(), u.data(), static_cast<int64_t>(g.size()), got.data(), other.data(), h.data());
    for (size_t i = 0; i + 1 < g.size(); ++i) {
      if (f16_is_misrounded(g[i])) continue;
      KTS_EXPECT(got[i] == f32_to_f16(g[i])) << isa_name(ops->isa) << " " << g[i];
    }
    KTS_EXPECT(std::isnan(f16_to_f32(got.back()))) << isa_name(ops->isa);
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

KTS_TEST(quantised_rows_are_equal_on_every_isa) {
  uint64_t seed = 20;
  for (const float size : {1.0f, 1e-37f, 2e-40f, 1e38f})
    for (const int64_t cols : {1, 3, 31, 32, 63, 64, 65, 127, 200, 1408}) {
      Random random(seed++);
      std::vector<bf16_t> x = random_bf16(random, cols, false);
      for (bf16_t& v : x) v = f32_to_bf16(bf16_to_f32(v) * size);
      const size_t padded = static_cast<size_t>(align_up(cols, 64));
      float largest = 0.0f;
      for (const bf16_t v : x) largest = std::fmax(largest, std::fabs(bf16_to_f32(v)));
      const bool tiny = largest < 127.0f * 0x1p-126f;
      const float scale = tiny ? 0x1p-126f : largest / 127.0f, inverse = tiny ? 0x1p126f : 127.0f / largest;
      std::vector<int8_t> want(padded, 0);
      for (size_t i = 0; i < x.size(); ++i) want[i] = static_cast<int8_t>(std::nearbyint(bf16_to_f32(x[i]) * inverse));
      for (const RowOps* ops : all_ops) {
        if (!runs_here(ops->isa)) continue;
        std::vector<int8_t> q(padded + 1, 77);
        KTS_EXPECT(ops->quantize_row(x.data(), cols, q.data()) == scale) << isa_name(ops->isa) << " " << cols;
        KTS_EXPECT(q.back() == 77) << isa_name(ops->isa) << " wrote past the padding of " << cols;
        q.pop_back();
        KTS_EXPECT(q == want) << isa_name(ops->isa) << " cols=" << cols << " size=" << size;
      }
    }
}

KTS_TEST(quantised_rows_of_zeros_and_of_nan) {
  for (const RowOps* ops : all_ops) {
    if (!runs_here(ops->isa)) continue;
    for (const int64_t cols : {1, 64, 70}) {
      const std::vector<int8_t> zeros(static_cast<size_t>(align_up(cols, 64)), 0);
      std::vector<bf16_t> x(static_cast<size_t>(cols), 0x8000);
      std::vector<int8_t> q(zeros.size(), 77);
      KTS_EXPECT(ops->quantize_row(x.data(), cols, q.data()) == 0.0f && q == zeros) << isa_name(ops->isa);
      for (const bf16_t bad : {bf16_t{0x7fc0}, bf16_t{0xff81}, bf16_t{0x7f80}, bf16_t{0xff80}}) {
        x.assign(x.size(), 0x3f80);
        x.back() = bad;
        q.assign(q.size(), 77);
        KTS_EXPECT(std::isnan(ops->quantize_row(x.data(), cols, q.data())) && q == zeros) << isa_name(ops->isa) << bad;
      }
    }
  }
}

}  // namespace kts::test
