// Every level against the scalar one through a whole layer, and every row operation on buffers that end at an unmapped
// page.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "emulated.h"
#include "kts/elementwise.h"
#include "kts/gemm.h"
#include "kts/moe.h"
#include "kts/thread_pool.h"

namespace kts::test {
namespace {

// `count` objects that end exactly where an unmapped page begins: a touch beyond them ends the process.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = static_cast<size_t>(count) * sizeof(T);
    mapped_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + mapped_ - page, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(base_ + mapped_ - page - bytes);
  }
  ~Guarded() { munmap(base_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return count_; }

 private:
  int64_t count_;
  size_t mapped_ = 0;
  char* base_ = nullptr;
  T* data_ = nullptr;
};

void fill(Guarded<bf16_t>& v, Random& random) {
  for (int64_t i = 0; i < v.size(); ++i) v[i] = f32_to_bf16(random.real());
}
void fill(Guarded<float>& v, Random& random) {
  for (int64_t i = 0; i < v.size(); ++i) v[i] = random.real();
}

template <class T>
bool same_bits(Guarded<T>& a, Guarded<T>& b) {
  return std::memcmp(a.get(), b.get(), static_cast<size_t>(a.size()) * sizeof(T)) == 0;
}

std::vector<const RowOps*> vector_ops() {
  std::vector<const RowOps*> found;
  for (const RowOps* ops : {&avx2::kRowOps, &avx512::kRowOps})
    if (detect_isa() & ops->isa) found.push_back(ops);
  return found;
}

}  // namespace

KTS_TEST(row_operations_equal_scalar_and_touch_nothing_beyond_their_rows) {
  const RowOps& plain = scalar::kRowOps;
  for (const RowOps* ops : vector_ops())
    for (int64_t cols = 1; cols <= 70; ++cols) {
      Random random(static_cast<uint64_t>(cols));
      const auto where = [&] { return std::string(isa_name(ops->isa)) + " cols=" + std::to_string(cols); };
      Guarded<float> f(cols), f2(cols), want(cols), got(cols);
      Guarded<bf16_t> b(cols), b2(cols), want_b(cols), got_b(cols), w1(cols), g1(cols), w2(cols), g2(cols);
      fill(f, random), fill(f2, random), fill(b, random), fill(b2, random);

      std::memcpy(want.get(), f2.get(), static_cast<size_t>(cols) * sizeof(float));
      std::memcpy(got.get(), f2.get(), static_cast<size_t>(cols) * sizeof(float));
      plain.scale_add(0.37f, f.get(), cols, want.get());
      ops->scale_add(0.37f, f.get(), cols, got.get());
      KTS_EXPECT(same_bits(want, got)) << "scale_add " << where();

      plain.to_bf16(f.get(), cols, want_b.get());
      ops->to_bf16(f.get(), cols, got_b.get());
      KTS_EXPECT(same_bits(want_b, got_b)) << "to_bf16 " << where();

      const RowMask mask{static_cast<uint32_t>(cols) * 77u, 0xdeadbeefu, 1 << 23};
      plain.mask_bf16(mask, 5, b.get(), cols, want_b.get());
      ops->mask_bf16(mask, 5, b.get(), cols, got_b.get());
      KTS_EXPECT(same_bits(want_b, got_b)) << "mask_bf16 " << where();
      plain.masked_add(mask, 5, f.get(), cols, want.get());
      ops->masked_add(mask, 5, f.get(), cols, got.get());
      KTS_EXPECT(same_bits(want, got)) << "masked_add " << where();

      for (int act = 0; act < kNumActivations; ++act) {
        const GluOps &plain_glu = plain.glu[act], &glu = ops->glu[act];
        const auto which = [&] { return std::string(kActivationNames[act]) + " " + where(); };
        const GateParams limits{1.702f, 0.5f};  // within the range of the numbers
        plain_glu.forward(limits, f.get(), f2.get(), cols, w1.get(), w2.get(), want_b.get());
        glu.forward(limits, f.get(), f2.get(), cols, g1.get(), g2.get(), got_b.get());
        for (int64_t j = 0; j < cols; ++j) {
          if (f16_is_misrounded(f.get()[j])) g1.get()[j] = w1.get()[j];
          if (f16_is_misrounded(f2.get()[j])) g2.get()[j] = w2.get()[j];
        }
        KTS_EXPECT(same_bits(w1, g1) && same_bits(w2, g2) && same_bits(want_b, got_b)) << "glu forward " << which();
        glu.forward(limits, f.get(), f2.get(), cols, nullptr, nullptr, got_b.get());
        KTS_EXPECT(same_bits(want_b, got_b)) << "glu forward without tape " << which();
        const float dot_want =
            plain_glu.backward(limits, b.get(), b2.get(), f.get(), 0.7f, cols, w1.get(), w2.get(), want_b.get());
        const float dot_got =
            glu.backward(limits, b.get(), b2.get(), f.get(), 0.7f, cols, g1.get(), g2.get(), got_b.get());
        KTS_EXPECT(same_bits(w1, g1) && same_bits(w2, g2) && same_bits(want_b, got_b)) << "glu backward " << which();
        KTS_EXPECT(std::fabs(dot_want - dot_got) <= 1e-5f * static_cast<float>(cols)) << "glu sum " << which();
      }
    }
}

KTS_TEST(thin_products_touch_nothing_beyond_their_rows) {
  for (const RowOps* ops : vector_ops())
    for (const int64_t length : {1, 15, 16, 17, 31, 33, 63, 65, 79, 130})
      for (const int64_t m : {1, 3, 5, 8}) {
        Random random(static_cast<uint64_t>(length * 10 + m));
        std::vector<std::unique_ptr<Guarded<bf16_t>>> rows;
        std::vector<const bf16_t*> pointers;
        for (int64_t i = 0; i < m; ++i) {
          rows.push_back(std::make_unique<Guarded<bf16_t>>(length));
          fill(*rows.back(), random);
          pointers.push_back(rows.back()->get());
        }
        const int64_t n = 6;
        Guarded<float> b(n * length);
        fill(b, random);
        Guarded<float> want(m * n), got(m * n);
        scalar::kRowOps.dot_rows(pointers.data(), m, b.get(), length, n, length, want.get(), n, false);
        ops->dot_rows(pointers.data(), m, b.get(), length, n, length, got.get(), n, false);
        for (int64_t i = 0; i < m * n; ++i)
          KTS_EXPECT(std::fabs(want[i] - got[i]) <= 1e-6f * static_cast<float>(length))
              << "dot_rows " << isa_name(ops->isa) << " k=" << length;

        Guarded<float> l(n * m), wide_want(n * length), wide_got(n * length);
        fill(l, random);
        scalar::kRowOps.axpy_rows(l.get(), m, 1, n, pointers.data(), 0, m, wide_want.get(), length, length, true);
        ops->axpy_rows(l.get(), m, 1, n, pointers.data(), 0, m, wide_got.get(), length, length, true);
        KTS_EXPECT(same_bits(wide_want, wide_got))
            << "axpy_rows " << isa_name(ops->isa) << " cols=" << length << " terms=" << m;

        std::vector<std::unique_ptr<Guarded<float>>> factors;
        std::vector<const float*> factor_rows;
        for (int64_t i = 0; i < m; ++i) {
          factors.push_back(std::make_unique<Guarded<float>>(length));
          fill(*factors.back(), random);
          factor_rows.push_back(factors.back()->get());
        }
        scalar::kRowOps.axpy_factor(l.get(), m, 1, n, factor_rows.data(), 0, m, wide_want.get(), length, length, true);
        ops->axpy_factor(l.get(), m, 1, n, factor_rows.data(), 0, m, wide_got.get(), length, length, true);
        KTS_EXPECT(same_bits(wide_want, wide_got))
            << "axpy_factor " << isa_name(ops->isa) << " cols=" << length << " terms=" << m;
      }
}

// Values are checked in gemm_rows_test.cc; here a read or write beyond the end faults.
KTS_TEST(kernel_rows_stay_inside_their_rows_and_packed_bytes) {
  for (const KernelRow& row : kernel_table()) {
    if ((detect_isa() & row.isa) == 0 || row.format >= Format::kF16) continue;
    const WeightFormat format{row.format, row.format == Format::kInt4 ? 32 : 0};
    for (const int64_t k : {1, 31, 33, 257, 300})
      for (const int64_t n : {1, 40, 130}) {
        const bool forward = row.direction == Direction::kForward;
        const int64_t m = row.max_m == 0 ? 13 : row.max_m, inner = forward ? k : n;
        const int64_t panels = ceil_div(forward ? n : k, kPanel), used = min_i64(panels, kMaxTaskPanels);
        Random random(static_cast<uint64_t>(k * 1000 + n));
        Guarded<bf16_t> w(n * k);
        Guarded<char> memory(packed_bytes(format, n, k));
        fill(w, random);
        const PackedMatrix matrix = packed_view(format, n, k, memory.get());
        pack_panels(w.get(), k, matrix, 0, matrix.n_panels());
        std::vector<std::unique_ptr<Guarded<bf16_t>>> rows;
        std::vector<std::unique_ptr<Guarded<int8_t>>> q_rows;
        std::vector<const bf16_t*> pointers;
        std::vector<const int8_t*> q_pointers;
        const std::vector<float> q_scales(static_cast<size_t>(m), 0.5f);
        for (int64_t i = 0; i < m; ++i) {
          rows.push_back(std::make_unique<Guarded<bf16_t>>(inner));
          fill(*rows.back(), random);
          pointers.push_back(rows.back()->get());
          q_rows.push_back(std::make_unique<Guarded<int8_t>>(align_up(k, 64)));
          for (int64_t t = 0; t < align_up(k, 64); ++t)
            (*q_rows.back())[t] = t < k ? static_cast<int8_t>(t % 255 - 127) : 0;
          q_pointers.push_back(q_rows.back()->get());
        }
        Guarded<char> scratch(kGemmScratchBytes);
        Guarded<float> c(m * used * kPanel);
        GemmTask task{pointers.data(), m, &matrix, panels - used, panels, c.get(), used * kPanel, false, scratch.get()};
        if (row.rows == Rows::kInt8) task.q_rows = q_pointers.data(), task.q_scales = q_scales.data();
        row.run(task);
        for (int64_t i = 0; i < m * used * kPanel; ++i)
          KTS_EXPECT(std::isfinite(c[i])) << row.name << " n=" << n << " k=" << k << " at " << i;
      }
  }
}

namespace {

// One layer with LoRA on all projections, its inputs and everything that forward and backward give.
struct LayerRun {
  static constexpr int64_t kExperts = 5, kHidden = 72, kInter = 50, kTokens = 33, kTopK = 2, kRank = 5;
  std::vector<float> out, dx, dweights;
  std::vector<float> lora[6];

  LayerRun(const std::string& isa, float dropout_p, bool retained) {
    const ScopedIsa scope(isa);
    Random random(11);
    const auto make = [&](int64_t count, float scale) {
      std::vector<bf16_t> v(static_cast<size_t>(count));
      for (bf16_t& x : v) x = f32_to_bf16(scale * random.real());
      return v;
    };
    ExpertShape shape;
    shape.num_experts = kExperts, shape.hidden = kHidden, shape.inter = kInter;
    ExpertStore store(shape);
    for (int64_t e = 0; e < kExperts; ++e) {
      const auto gate = make(kInter * kHidden, 0.3f), up = make(kInter * kHidden, 0.3f),
                 down = make(kHidden * kInter, 0.3f);
      store.load_expert(e, {gate.data(), 2 * kHidden}, {up.data(), 2 * kHidden}, {down.data(), 2 * kInter});
    }
    const auto x = make(kTokens * kHidden, 1.0f), dout = make(kTokens * kHidden, 1.0f);
    std::vector<int64_t> ids;
    std::vector<float> weights;
    for (int64_t t = 0; t < kTokens; ++t) {
      const int first = random.integer(0, kExperts - 1);
      ids.push_back(first);
      ids.push_back((first + 1 + random.integer(0, kExperts - 2)) % kExperts);
      for (int s = 0; s < kTopK; ++s) weights.push_back(0.5f + 0.5f * random.real());
    }
    const auto make_factor = [&](int64_t count) {
      std::vector<float> v(static_cast<size_t>(count));
      for (float& x : v) x = 0.3f * random.real();
      return v;
    };
    std::vector<float> factor[6];
    ExpertLora views;
    ExpertLoraGrads grads;
    LoraView* view[3] = {&views.gate, &views.up, &views.down};
    LoraGradView* grad[3] = {&grads.gate, &grads.up, &grads.down};
    for (int p = 0; p < 3; ++p) {
      const int64_t in = p < 2 ? kHidden : kInter, width = p < 2 ? kInter : kHidden;
      factor[2 * p] = make_factor(kExperts * kRank * in), factor[2 * p + 1] = make_factor(kExperts * kRank * width);
      lora[2 * p].resize(factor[2 * p].size()), lora[2 * p + 1].resize(factor[2 * p + 1].size());
      *view[p] = {factor[2 * p].data(), kRank * in, in, factor[2 * p + 1].data(), kRank * width, width, kRank, 1.5f};
      *grad[p] = {{lora[2 * p].data(), kRank * in, in}, {lora[2 * p + 1].data(), kRank * width, width}};
    }
    out.resize(kTokens * kHidden), dx.resize(kTokens * kHidden), dweights.resize(kTokens * kTopK);
    std::vector<f16_t> g(static_cast<size_t>(kTokens * kTopK * shape.inter_stride())), u = g;
    const MoeLayer layer(store);
    const MoeInput input{kTokens, kTopK, x.data(), ids.data(), weights.data()};
    const Dropout dropout{dropout_p, 99};
    const ForwardTape tape = retained ? ForwardTape{g.data(), u.data()} : ForwardTape{};
    layer.forward(input, views, dropout, 20, tape, {nullptr, out.data()});
    layer.backward(input, dout.data(), views, dropout, 20, tape, {{nullptr, dx.data()}, dweights.data(), grads});
  }
};

// |a - b| / |b| over all elements
double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    error += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    size += static_cast<double>(b[i]) * b[i];
  }
  return std::sqrt(error / size);
}

}  // namespace

// Levels differ in the order of the lanes of thin products only, so at most in the last bit of a few bf16
// intermediates.
KTS_TEST(a_layer_agrees_on_every_isa) {
  for (const float p : {0.0f, 0.25f})
    for (const bool retained : {true, false}) {
      const LayerRun want("scalar", p, retained);
      for (const std::string& isa : isa_names(detect_isa())) {
        const LayerRun got(isa, p, retained);
        const auto close = [&](const char* what, const std::vector<float>& a, const std::vector<float>& b) {
          const double d = distance(a, b);
          KTS_EXPECT(d <= 1e-3) << what << " on " << isa << " dropout " << p << " retained " << retained << ": " << d;
        };
        close("out", got.out, want.out);
        close("dx", got.dx, want.dx);
        close("dtopk_weights", got.dweights, want.dweights);
        for (int i = 0; i < 6; ++i) close("lora gradient", got.lora[i], want.lora[i]);
      }
    }
}

}  // namespace kts::test
