// Parts of larger packed matrices, read where they lie: every row of the kernel table gives the bits that it gives for
// the same weights in memory of their own, whatever lies around them.
#include <cstring>
#include <vector>

#include "check.h"
#include "kts/gemm.h"
#include "rows_problem.h"

namespace kts::test {
namespace {

// A matrix inside a larger one of bytes 0xff: NaN, and the largest codes.
class Surrounded {
 public:
  Surrounded(const PackedMatrix& matrix, int64_t panels_before, int64_t units_before, int64_t units_after)
      : n_(panels_before * kPanel + align_up(matrix.n, kPanel) + kPanel),
        k_((units_before + units_after) * matrix.format.k_unit() + align_up(matrix.k, matrix.format.k_unit())),
        memory_(packed_bytes(matrix.format, n_, k_), 0xff),
        sums_(align_up(matrix.n, kPanel) * static_cast<int64_t>(sizeof(int32_t)), 0) {
    const PackedMatrix whole = packed_view(matrix.format, n_, k_, memory_.data());
    const int64_t k_begin = units_before * matrix.format.k_unit();
    const int64_t k = align_up(matrix.k, matrix.format.k_unit());
    part_ = packed_part(whole, panels_before * kPanel, align_up(matrix.n, kPanel), k_begin, k);
    part_.n = matrix.n, part_.k = matrix.k;
    for (int64_t panel = 0; panel < matrix.n_panels(); ++panel) {
      copy_panel(matrix, part_, panel);
      if (matrix.format.kind == Format::kInt8)
        sum_columns(part_, panel, reinterpret_cast<int32_t*>(sums_.data()) + panel * kPanel);
    }
    if (matrix.format.kind == Format::kInt8) part_.column_sums = reinterpret_cast<const int32_t*>(sums_.data());
  }
  const PackedMatrix& part() const { return part_; }

 private:
  int64_t n_, k_;
  Bytes memory_;
  Bytes sums_;
  PackedMatrix part_;
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<WeightFormat> all_formats() {
  std::vector<WeightFormat> all;
  for (const Format kernel : {Format::kBf16, Format::kInt8, Format::kInt4, Format::kF16, Format::kBlock4,
                              Format::kBlock5, Format::kBlock6, Format::kBlock8})
    for (const WeightFormat format : formats_of(kernel)) all.push_back(format);
  return all;
}

}  // namespace

// k of the first shapes ends inside a tile, as that of a last shard may; more than one block of the sum and of a task.
KTS_TEST(kernel_rows_read_parts_of_larger_matrices) {
  for (const KernelRow& row : kernel_table()) {
    if ((detect_isa() & row.isa) == 0) continue;
    for (const WeightFormat format : formats_of(row.format))
      for (Shape shape : {Shape{1, 45, 77}, {3, 37, 100}, {20, 70, 300}, {75, 170, 192}}) {
        if (row.max_m != 0 && shape.m > row.max_m) continue;
        if (is_block_format(format.kind)) shape.k = align_up(shape.k, block_type_info(format.type).block);
        Random random(static_cast<uint64_t>(shape.m));
        Problem problem(format, shape, random, Values::kReals);
        int64_t ldc = 0;
        const std::vector<float> want = problem.run(row, may_accumulate(row), &ldc);
        const Surrounded surrounded(problem.w.matrix(), 2, 1, 3);
        const std::vector<float> got = problem.run(row, may_accumulate(row), &ldc, 0, -1, &surrounded.part());
        KTS_EXPECT(same_bits(got, want)) << row.name << " " << format_name(format) << " group=" << format.group
                                         << " m=" << shape.m << " n=" << shape.n << " k=" << shape.k;
      }
  }
}

KTS_TEST(parts_unpack_to_their_weights) {
  for (const WeightFormat format : all_formats()) {
    Random random(5);
    PackedProblem problem(format, 70, align_up(300, is_block_format(format.kind) ? 256 : 1), Values::kReals, random);
    const Surrounded surrounded(problem.matrix(), 1, 2, 1);
    const auto unpacked = [&](const PackedMatrix& matrix) {
      std::vector<float> w(static_cast<size_t>(matrix.n * matrix.k));
      unpack_panels(matrix, 0, matrix.n_panels(), w.data(), matrix.k);
      return w;
    };
    KTS_EXPECT(same_bits(unpacked(surrounded.part()), unpacked(problem.matrix()))) << format_name(format);
  }
}

KTS_TEST(a_part_as_large_as_the_matrix_is_the_matrix) {
  for (const WeightFormat format : all_formats()) {
    Random random(6);
    PackedProblem problem(format, 40, align_up(90, is_block_format(format.kind) ? 256 : 1), Values::kReals, random);
    const PackedMatrix whole = problem.matrix(), part = packed_part(whole, 0, whole.n, 0, whole.k);
    KTS_EXPECT(part.data == whole.data && part.scales == whole.scales && part.column_sums == whole.column_sums &&
               part.n == whole.n && part.k == whole.k && part.panel_stride_bytes == whole.panel_stride_bytes &&
               part.scale_stride_bytes == whole.scale_stride_bytes)
        << format_name(format);
  }
}

}  // namespace kts::test
