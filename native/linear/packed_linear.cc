// PackedLinear: checks, cuts a product into tasks of row blocks x column panels, rounds the sums once. A task's sums stay
// in its thread's scratch, so one pass writes the result once and reads nothing back.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <string>

#include "../gemm/schedule.h"
#include "kts/linear.h"
#include "kts/openmp.h"
#include "kts/thread_pool.h"

namespace kts {

namespace {

// Rows of one pass: bounds the memory of row pointers and quantised rows.
constexpr int64_t kPassRows = 4096;
// Row blocks are multiples of this, which every block_m divides but AMX's 32, which two blocks make.
constexpr int64_t kRowUnit = 48;
// Multiply-adds of a product that the calling thread computes alone: waking the others would take as long.
constexpr int64_t kAloneProducts = int64_t{1} << 18;
constexpr int kMaxPools = 32;
// Of n and k: no size of a layer overflows.
constexpr int64_t kMaxWidth = int64_t{1} << 24;

// One product over at most kPassRows rows.
struct Product {
  const KernelRow* kernel = nullptr;
  const RowOps* ops = nullptr;
  PackedMatrix w;
  const bf16_t* a = nullptr;
  int64_t a_stride = 0;
  int64_t m = 0;
  const float* bias = nullptr;
  LinearOutput out;

  int64_t row_block = 0;
  int64_t width = 0;   // panels of a task
  int64_t groups = 0;  // column groups
  const bf16_t** a_rows = nullptr;
  int8_t* q = nullptr;  // [m, q_stride], int8 rows only
  const int8_t** q_rows = nullptr;
  float* q_scales = nullptr;
  std::byte* gemm_scratch = nullptr;  // [threads][kGemmScratchBytes]
  float* sums = nullptr;              // [threads][kRowBlock, 128]

  bool is_forward() const { return kernel->direction == Direction::kForward; }
  int64_t reduced() const { return is_forward() ? w.k : w.n; }
  int64_t columns() const { return is_forward() ? w.n : w.k; }
  int64_t q_stride() const { return align_up(w.k, 64); }
  int64_t num_blocks() const { return ceil_div(m, row_block); }
};

constexpr int64_t kSumElements = kRowBlock * kMaxTaskPanels * kPanel;

// Equal blocks rather than full ones and a rest, and smaller ones where columns alone cannot keep the threads busy.
// Results do not depend on it: each row of a product depends on its own row of `a` only.
void cut(Product& p, int threads) {
  const int64_t panels = ceil_div(p.columns(), kPanel);
  int64_t rows = kRowBlock;
  while (rows > kRowUnit && rows / 2 < p.m && ceil_div(p.m, rows) * panels < 2 * static_cast<int64_t>(threads))
    rows /= 2;
  p.row_block = min_i64(rows, align_up(ceil_div(p.m, ceil_div(p.m, rows)), kRowUnit));
  p.width = panels_per_task(panels, p.num_blocks(), threads);
  p.groups = ceil_div(panels, p.width);
}

void plan(Product& p, int threads, Arena& arena) {
  p.a_rows = arena.take<const bf16_t*>(p.m);
  if (p.kernel->rows == Rows::kInt8) {
    p.q = arena.take<int8_t>(p.m * p.q_stride());
    p.q_rows = arena.take<const int8_t*>(p.m);
    p.q_scales = arena.take<float>(p.m);
  }
  p.gemm_scratch = arena.take<std::byte>(threads * kGemmScratchBytes);
  p.sums = arena.take<float>(threads * kSumElements);
}

void quantize_rows(Product& p, ThreadPool& pool) {
  pool.parallel_for(p.m, [&](int64_t row, int) {
    int8_t* q = p.q + row * p.q_stride();
    p.q_scales[row] = p.ops->quantize_row(p.a_rows[row], p.w.k, q);
    p.q_rows[row] = q;
  });
}

void store_row(const Product& p, float* sum, int64_t row, const ColumnRange& range) {
  if (p.bias != nullptr) p.ops->scale_add(1.0f, p.bias + range.col, range.cols, sum);
  const int64_t at = row * p.out.stride + range.col;
  if (p.out.bf16 != nullptr) {
    p.ops->to_bf16(sum, range.cols, p.out.bf16 + at);
  } else {
    std::memcpy(p.out.f32 + at, sum, static_cast<size_t>(range.cols) * sizeof(float));
  }
}

void run_task(const Product& p, int64_t block, int64_t group, int thread) {
  const ColumnRange range = column_range(group, p.width, p.columns());
  const int64_t begin = block * p.row_block, rows = min_i64(p.row_block, p.m - begin);
  float* sums = p.sums + thread * kSumElements;
  GemmTask gemm;
  gemm.m = rows;
  gemm.w = &p.w;
  gemm.panel_begin = range.panel_begin;
  gemm.panel_end = range.panel_end;
  gemm.c = sums;
  gemm.ldc = range.padded_cols;
  gemm.scratch = p.gemm_scratch + thread * kGemmScratchBytes;
  if (p.q != nullptr) {
    gemm.q_rows = p.q_rows + begin;
    gemm.q_scales = p.q_scales + begin;
  } else {
    gemm.a_rows = p.a_rows + begin;
  }
  KTS_DCHECK(p.kernel->max_m == 0 || rows <= p.kernel->max_m);
  p.kernel->run(gemm);
  for (int64_t i = 0; i < rows; ++i) store_row(p, sums + i * range.padded_cols, begin + i, range);
}

// The row of the table by name, or the selected one. Chosen for the whole call, not for a task: a result must not
// depend on how the work is cut.
const KernelRow& choose_kernel(const char* name, GemmProduct product) {
  if (name != nullptr && *name != '\0') return named_gemm(name, product);
  product.m = min_i64(product.m, kRowBlock);
  return select_gemm(product, active_isa());
}

// Whether the calling thread computes m rows alone.
bool is_small(const PackedMatrix& w, int64_t m) { return m <= kAloneProducts / (w.n * w.k); }

// `near`: column groups lie in the memory of the pools, in order (forward of a layer that was placed).
void run_tasks(const Product& p, ThreadPool& pool, bool near) {
  if (is_small(p.w, p.m)) {  // one task, not none: the pool also ends the thread's AMX phase
    pool.parallel_for(1, [&](int64_t, int thread) {
      for (int64_t task = 0; task < p.num_blocks() * p.groups; ++task)
        run_task(p, task / p.groups, task % p.groups, thread);
    });
    return;
  }
  if (!near) {
    pool.parallel_for(p.num_blocks() * p.groups,
                      [&](int64_t task, int thread) { run_task(p, task / p.groups, task % p.groups, thread); });
    return;
  }
  int64_t tasks[kMaxPools];
  const auto first = [&](int i) { return p.groups * i / pool.pools(); };
  for (int i = 0; i < pool.pools(); ++i) tasks[i] = p.num_blocks() * (first(i + 1) - first(i));
  pool.parallel_for_pools(tasks, [&](int i, int64_t task, int thread) {
    const int64_t groups = first(i + 1) - first(i);
    run_task(p, task / groups, first(i) + task % groups, thread);
  });
}

// Call with runtime().mutex held.
void run_product(Product p, int64_t m, int placed_pools) {
  ThreadPool& pool = *runtime().pool;
  const bool near = p.is_forward() && placed_pools > 1 && placed_pools == pool.pools();
  const bf16_t* a = p.a;
  const LinearOutput out = p.out;
  p.ops = &row_ops(active_isa());
  if (!is_small(p.w, m)) calm_openmp_threads();
  for (int64_t begin = 0; begin < m; begin += kPassRows) {
    p.m = min_i64(kPassRows, m - begin);
    p.a = a + begin * p.a_stride;
    p.out.bf16 = out.bf16 == nullptr ? nullptr : out.bf16 + begin * out.stride;
    p.out.f32 = out.f32 == nullptr ? nullptr : out.f32 + begin * out.stride;
    cut(p, pool.threads());
    Arena counting;
    plan(p, pool.threads(), counting);
    Arena arena = pass_arena(counting.used());
    plan(p, pool.threads(), arena);
    for (int64_t i = 0; i < p.m; ++i) p.a_rows[i] = p.a + i * p.a_stride;
    if (p.q != nullptr) quantize_rows(p, pool);
    run_tasks(p, pool, near);
  }
}

void check_output(const LinearOutput& out, int64_t m) {  // without rows an output has no address
  KTS_CHECK(m == 0 || (out.bf16 == nullptr) != (out.f32 == nullptr), "PackedLinear: expected one output");
}

}  // namespace

PackedLinear::PackedLinear(int64_t n, int64_t k, WeightFormat format) : n_(n), k_(k), format_(format) {
  KTS_CHECK(n > 0 && k > 0, "PackedLinear: n and k must be positive");
  KTS_CHECK(n <= kMaxWidth && k <= kMaxWidth, "PackedLinear: expected n and k of at most 16777216");
  check_format(format, k);
  weights_ = PageBuffer(static_cast<size_t>(kts::packed_bytes(format, n, k)));
  std::lock_guard<std::mutex> lock(runtime().mutex);
  const ThreadPool& pool = *runtime().pool;
  if (pool.pools() == 1 || pool.pools() > kMaxPools || weights_.bytes() < pool.pools() * kHugePage) return;
  // Forward of pool i reads panels from n_panels * i / pools on; the gradient reads all of them from everywhere.
  placed_pools_ = pool.pools();
  const size_t pages = weights_.bytes() / kHugePage;
  for (size_t i = 0; i < static_cast<size_t>(placed_pools_); ++i) {
    const size_t begin = pages * i / placed_pools_ * kHugePage;
    const size_t end =
        i + 1 == static_cast<size_t>(placed_pools_) ? weights_.bytes() : pages * (i + 1) / placed_pools_ * kHugePage;
    pool.place(static_cast<char*>(weights_.data()) + begin, end - begin, static_cast<int>(i));
  }
}

void PackedLinear::check_loaded() const { KTS_CHECK(loaded_, "PackedLinear: it has no weights yet; call load first"); }

void PackedLinear::load(const bf16_t* w, int64_t stride) {
  struct Source {
    PackedMatrix packed;
    const bf16_t* w;
    int64_t stride;
  } source{weight(), w, stride};
  std::lock_guard<std::mutex> lock(runtime().mutex);
  loaded_ = false;
  runtime().pool->parallel_for(source.packed.n_panels(), [&source](int64_t panel, int) {
    pack_panels(source.w, source.stride, source.packed, panel, panel + 1);
  });
  loaded_ = true;
}

void PackedLinear::load_blocks(const uint8_t* w, int64_t row_bytes) {
  const PackedMatrix packed = weight();
  std::lock_guard<std::mutex> lock(runtime().mutex);
  loaded_ = false;
  runtime().pool->parallel_for(packed.n_panels(),
                               [&](int64_t panel, int) { pack_block_panels(w, row_bytes, packed, panel, panel + 1); });
  loaded_ = true;
}

template <class T>
void PackedLinear::unpack_parallel(T* w, int64_t stride) const {
  std::lock_guard<std::mutex> lock(runtime().mutex);
  check_loaded();
  const PackedMatrix packed = weight();
  runtime().pool->parallel_for(packed.n_panels(),
                               [&](int64_t panel, int) { unpack_panels(packed, panel, panel + 1, w, stride); });
}

void PackedLinear::unpack(bf16_t* w, int64_t stride) const { unpack_parallel(w, stride); }

void PackedLinear::unpack(float* w, int64_t stride) const { unpack_parallel(w, stride); }

void PackedLinear::forward(const bf16_t* a, int64_t a_stride, int64_t m, Rows rows, const float* bias,
                           const char* kernel, const LinearOutput& out) const {
  std::lock_guard<std::mutex> lock(runtime().mutex);
  check_loaded();
  check_output(out, m);
  KTS_CHECK(rows != Rows::kInt8 || k_ <= kMaxInt8RowLength, "PackedLinear: int8 rows take at most 32768 inputs");
  Product p;
  p.kernel = &choose_kernel(kernel, {format_.kind, rows, Direction::kForward, m, n_, k_});
  p.w = weight();
  p.a = a;
  p.a_stride = a_stride;
  p.bias = bias;
  p.out = out;
  run_product(p, m, placed_pools_);
}

void PackedLinear::input_grad(const bf16_t* dy, int64_t dy_stride, int64_t m, const char* kernel,
                              const LinearOutput& out) const {
  std::lock_guard<std::mutex> lock(runtime().mutex);
  check_loaded();
  check_output(out, m);
  Product p;
  p.kernel = &choose_kernel(kernel, {format_.kind, Rows::kBf16, Direction::kInputGrad, m, n_, k_});
  p.w = weight();
  p.a = dy;
  p.a_stride = dy_stride;
  p.out = out;
  run_product(p, m, placed_pools_);
}

}  // namespace kts
