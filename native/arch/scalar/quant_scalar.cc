// Weight quantisers of the scalar level; the code is in quantize_inl.h. The int4 search sums squared errors in eight
// lanes, so its vector here is eight floats, with the order of additions of vec_avx2.h.
#include <cstring>

#include "../quantize_inl.h"
#include "../vec_scalar.h"

namespace kts::scalar {

namespace {

struct Lanes {
  struct F {
    float v[8];
  };
  static constexpr int W = 8;

  template <class Fn>
  KTS_INLINE F each(Fn&& fn) {
    F result;
    for (int i = 0; i < W; ++i) result.v[i] = fn(i);
    return result;
  }
  KTS_INLINE F set1(float x) {
    return each([&](int) { return x; });
  }
  KTS_INLINE F zero() { return set1(0.0f); }
  KTS_INLINE F load(const float* p) {
    return each([&](int i) { return p[i]; });
  }
  KTS_INLINE void store(float* p, F a) { std::memcpy(p, a.v, sizeof(a.v)); }
  KTS_INLINE F load_bf16(const bf16_t* p) {
    return each([&](int i) { return bf16_to_f32(p[i]); });
  }
  KTS_INLINE F load_bf16_n(const bf16_t* p, int64_t n) {
    return each([&](int i) { return i < n ? bf16_to_f32(p[i]) : 0.0f; });
  }
  KTS_INLINE F add(F a, F b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  KTS_INLINE F sub(F a, F b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  KTS_INLINE F mul(F a, F b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  KTS_INLINE F min(F a, F b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  KTS_INLINE F max(F a, F b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  KTS_INLINE F round_even(F a) {
    return each([&](int i) { return __builtin_rintf(a.v[i]); });
  }
  KTS_INLINE float sum(F a) {
    const auto pair = [&](int i) { return a.v[i] + a.v[i + 4]; };
    return (pair(0) + pair(2)) + (pair(1) + pair(3));
  }
  KTS_INLINE void store_int8(int8_t* q, F a, F b, F c, F d) {
    const F* all[] = {&a, &b, &c, &d};
    for (int i = 0; i < 4 * W; ++i) q[i] = static_cast<int8_t>(all[i / W]->v[i % W]);
  }
};

}  // namespace

constinit const QuantOps kQuantOps = make_quant_ops<Lanes, Vec>(kScalar);

}  // namespace kts::scalar
