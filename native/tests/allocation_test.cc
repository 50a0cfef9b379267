// Counts allocations: a training step of fixed shape makes none after the first. All operators new of the test program
// end here; native code calls neither malloc (tests/native/test_spills.py looks for it) nor, between growths of the
// scratch, mmap.
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "check.h"
#include "kts/moe.h"
#include "kts/thread_pool.h"
#include "kts/workspace.h"

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define KTS_COUNTS_ALLOCATIONS 1

namespace {
std::atomic<int64_t> allocations{0};

void* counted(std::size_t bytes, std::size_t alignment) {
  ++allocations;
  const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* memory = alignment <= alignof(std::max_align_t) ? std::malloc(bytes > 0 ? bytes : 1)
                                                        : std::aligned_alloc(alignment, rounded);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
}  // namespace

// The forms that are not here end in these.
void* operator new(std::size_t bytes) { return counted(bytes, 1); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return counted(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
#endif

namespace kts::test {

#ifdef KTS_COUNTS_ALLOCATIONS
namespace {

constexpr int64_t kExperts = 5, kHidden = 96, kInter = 160, kTokens = 37, kTopK = 2, kRank = 5;

template <class T>
std::vector<T> filled(int64_t count, float scale, Random& random) {
  std::vector<T> v(static_cast<size_t>(count));
  for (T& x : v) {
    const float value = scale * random.real();
    if constexpr (std::is_same_v<T, float>)
      x = value;
    else
      x = f32_to_bf16(value);
  }
  return v;
}

// A layer with LoRA on all projections and what a training step needs.
struct Training {
  Random random{7};
  ExpertStore store;
  MoeLayer layer{store};
  std::vector<bf16_t> x = filled<bf16_t>(kTokens * kHidden, 1.0f, random), dout = x;
  std::vector<int64_t> ids;
  std::vector<float> weights = filled<float>(kTokens * kTopK, 1.0f, random);
  std::vector<float> a = filled<float>(kExperts * kRank * kInter, 0.3f, random), b = a;
  std::vector<float> da[3] = {a, a, a}, db[3] = {a, a, a};
  std::vector<float> out = std::vector<float>(static_cast<size_t>(kTokens * kHidden)), dx = out, dweights = weights;
  std::vector<std::remove_pointer_t<decltype(ForwardTape::g)>> g, u;

  explicit Training(const ExpertShape& shape) : store(shape) {
    const auto w = filled<bf16_t>(kInter * kHidden, 0.3f, random);
    for (int64_t e = 0; e < kExperts; ++e)
      store.load_expert(e, {w.data(), 2 * kHidden}, {w.data(), 2 * kHidden}, {w.data(), 2 * kInter});
    for (int64_t i = 0; i < kTokens * kTopK; ++i) ids.push_back((i + i / kTopK) % kExperts);
    g.resize(static_cast<size_t>(kTokens * kTopK * shape.inter_stride()));
    u = g;
  }

  void step(Rows rows, bool retained) {
    const LoraView wide{a.data(), kRank * kHidden, kHidden, b.data(), kRank * kInter, kInter, kRank, 1.5f};
    const LoraView down{a.data(), kRank * kInter, kInter, b.data(), kRank * kHidden, kHidden, kRank, 1.5f};
    const auto grad = [&](const LoraView& v, int i) {
      return LoraGradView{{da[i].data(), v.a_expert, v.a_rank}, {db[i].data(), v.b_expert, v.b_rank}};
    };
    LoraView up = wide;
    up.a = b.data();  // gate and up do not share A
    const ExpertLora lora{wide, up, down};
    MoeInput input{kTokens, kTopK, x.data(), ids.data(), weights.data()};
    input.rows = rows;
    const Dropout dropout{0.25f, 99};
    const ForwardTape tape = retained ? ForwardTape{g.data(), u.data()} : ForwardTape{};
    layer.forward(input, lora, dropout, 20, tape, {nullptr, out.data()});
    layer.backward(input, dout.data(), lora, dropout, 20, tape,
                   {{nullptr, dx.data()}, dweights.data(), {grad(wide, 0), grad(up, 1), grad(down, 2)}});
  }
};

// Workers that start late bind themselves to CPUs meanwhile.
void wait_for_workers() {
  Runtime& rt = runtime();
  const std::lock_guard<std::mutex> lock(rt.mutex);
  std::atomic<int> inside{0};
  rt.pool->parallel_for(rt.pool->threads(), [&](int64_t, int) {
    ++inside;
    while (inside < rt.pool->threads()) std::this_thread::yield();
  });
}

ExpertShape training_shape(WeightFormat format) {
  ExpertShape shape;
  shape.num_experts = kExperts, shape.hidden = kHidden, shape.inter = kInter, shape.format = format;
  return shape;
}

}  // namespace

KTS_TEST(the_counter_sees_allocations) {
  const int64_t before = allocations;
  const std::vector<std::string> some(3, std::string(100, 'x'));
  KTS_EXPECT(allocations >= before + 4) << some.size();
}

KTS_TEST(a_training_step_allocates_nothing_after_the_first) {
  const int threads_before = num_threads();
  for (const int pools : {1, 2}) {
    set_threads(3, pools, true);
    wait_for_workers();
    for (const WeightFormat format : {WeightFormat{}, WeightFormat{Format::kInt8}, WeightFormat{Format::kInt4, 32}}) {
      Training training(training_shape(format));
      for (const Rows rows : {Rows::kBf16, Rows::kInt8})
        for (const bool retained : {true, false}) {
          if (rows == Rows::kInt8 && format.kind == Format::kBf16) continue;
          training.step(rows, retained);
          const int64_t before = allocations, growths = pass_arena_growths();
          for (int i = 0; i < 3; ++i) training.step(rows, retained);
          KTS_EXPECT(allocations == before && pass_arena_growths() == growths)
              << format_name(format) << (rows == Rows::kInt8 ? " int8 rows" : " bf16 rows") << " retained " << retained
              << " pools " << pools << ": " << allocations - before << " allocations";
        }
    }
  }
  set_threads(threads_before, 1);
}
#endif

}  // namespace kts::test
