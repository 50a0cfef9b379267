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

constexpr int64_t kRows = 4, kN = 70;

bool is_bfp(const KernelRow& row) { return row.rows == Rows::kBfp16; }

// More than one pass of 2048; whole blocks.
int64_t columns_of(WeightFormat format) { return is_block_format(format.kind) ? 2304 : 2200; }

// Every block of 32 gets a size and a spread of its own.
void fill_rows(std::vector<bf16_t>& a, int64_t k, Random& random) {
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t b = 0; b * 32 < k; ++b) {
      const int size = random.integer(-30, 30), spread = static_cast<int>(b % 5) * 4;
      for (int64_t j = b * 32; j < min_i64(k, b * 32 + 32); ++j) {
        float x = std::ldexp(random.real(), size - random.integer(0, spread));
        if (b % 7 == 3) x = 0.0f;
        if (b % 11 == 5) x = std::ldexp(x, -110 - size);
        a[static_cast<size_t>(i * k + j)] = f32_to_bf16(x);
      }
    }
}

// W[n, k] = factor * q + offset for the groups of 32 or 16 of one output channel.
struct Channel {
  std::vector<int> q;
  std::vector<BlockScale> groups;
  size_t group = 32;
};

Channel channel_of(const Problem& problem, const PackedMatrix& w, int64_t n) {
  Channel channel;
  const bool is_block = is_block_format(w.format.kind);
  if (is_block) channel.group = static_cast<size_t>(block_type_info(w.format.type).group);
  for (int64_t k = 0; k < w.k; ++k) {
    if (k % static_cast<int64_t>(channel.group) == 0) {
      const float scale = w.format.kind == Format::kInt4 ? packed_scale(w, n, k) : 1.0f;
      channel.groups.push_back(is_block ? packed_block_scale(w, n, k) : BlockScale{scale, 0.0f});
    }
    channel.q.push_back(is_block ? packed_code(w, n, k)
                                 : static_cast<int>(problem.w.value(n, k) / channel.groups.back().factor));
  }
  return channel;
}

// The definition: blocks of 32 elements share an exponent.
float bfp_dot(const bf16_t* x, const Channel& w) {
  float sum = 0.0f;
  for (size_t b = 0; b * 32 < w.q.size(); ++b) {
    const size_t end = std::min(w.q.size(), b * 32 + 32);
    int exponent = 15 - 127;
    for (size_t j = b * 32; j < end; ++j) exponent = std::max(exponent, (x[j] >> 7 & 0xff) - 127);
    if (exponent == 128) return std::nanf("");
    const float unit = std::ldexp(1.0f, exponent - 14);
    const auto mantissa = [&](size_t j) {
      return static_cast<int64_t>(std::nearbyint(std::ldexp(static_cast<double>(bf16_to_f32(x[j])), 14 - exponent)));
    };
    for (size_t begin = b * 32; begin < end; begin += w.group) {
      int64_t terms = 0, elements = 0;
      for (size_t j = begin; j < std::min(end, begin + w.group); ++j)
        terms += mantissa(j) * w.q[j], elements += mantissa(j);
      const BlockScale& scale = w.groups[begin / w.group];
      sum = std::fmaf(static_cast<float>(terms), scale.factor * unit, sum);
      sum = std::fmaf(static_cast<float>(elements) * unit, scale.offset, sum);
    }
  }
  return sum;
}

std::vector<float> expected(Problem& problem) {
  const PackedMatrix w = problem.w.matrix();
  std::vector<float> c(static_cast<size_t>(kRows * kN));
  for (int64_t n = 0; n < kN; ++n) {
    const Channel channel = channel_of(problem, w, n);
    for (int64_t i = 0; i < kRows; ++i)
      c[static_cast<size_t>(i * kN + n)] =
          bfp_dot(problem.forward_a.data() + i * w.k, channel) * problem.w.scale[static_cast<size_t>(n)];
  }
  return c;
}

void check_bfp_row(const KernelRow& row, WeightFormat format) {
  const int64_t k = columns_of(format);
  Random random(static_cast<uint64_t>(format.group) + static_cast<uint64_t>(format.type));
  Problem problem(format, {kRows, kN, k}, random, Values::kReals);
  fill_rows(problem.forward_a, k, random);
  problem.forward_a[static_cast<size_t>(2 * k + 777)] = 0x7f80;  // infinity
  const std::vector<float> want = expected(problem);
  for (int64_t m = 1; m <= kRows; ++m) {
    int64_t ldc = 0;
    const std::vector<float> got = problem.run(row, false, &ldc, kRows - m, m);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t n = 0; n < kN; ++n) {
        const float w = want[static_cast<size_t>((kRows - m + i) * kN + n)], g = got[static_cast<size_t>(i * ldc + n)];
        KTS_EXPECT(w == g || (std::isnan(w) && std::isnan(g)))
            << row.name << " " << format_name(format) << " group=" << format.group << " m=" << m << " [" << i << ", "
            << n << "]: " << g << " != " << w;
      }
  }
}

}  // namespace

KTS_TEST(block_floating_point_gemv_has_the_bits_of_its_definition) {
  for (const KernelRow& row : kernel_table())
    if (is_bfp(row) && (detect_isa() & row.isa) != 0)
      for (const WeightFormat format : formats_of(row.format)) check_bfp_row(row, format);
}

}  // namespace kts::test
