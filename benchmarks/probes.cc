// Limits of this machine, measured in a few milliseconds so that they can be taken beside every benchmark sample:
//   units  operations per second of each compute unit, a multiply-add counts 2; independent chains, operands in registers
//   DRAM   bytes read per second, every cache line once, from a buffer larger than the last-level cache
// Built on demand by benchmarks/roofline.py with a baseline x86-64 compiler line; the wide loops carry their own target
// attribute and run only where CPUID allows it. Threads meet at a barrier; a rate is total work / time of the slowest.
#include <cpuid.h>
#include <immintrin.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Twelve chains hide a latency of 4 cycles at 2 per cycle (8 needed) and fit the 16 registers of AVX2.
#define KTS_TWELVE(step) \
  step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7) step(8) step(9) step(10) step(11)

// One loop: twelve accumulators of `type`, each step applied to all of them in every round.
#define KTS_LOOP(name, isa, type, first, step, last)                             \
  __attribute__((target(isa), noinline)) int64_t name(int64_t rounds) {          \
    const type x = first(3), y = first(2);                                       \
    type sum0 = first(0), sum1 = first(1), sum2 = first(2), sum3 = first(3);     \
    type sum4 = first(4), sum5 = first(5), sum6 = first(6), sum7 = first(7);     \
    type sum8 = first(8), sum9 = first(9), sum10 = first(10), sum11 = first(11); \
    for (int64_t round = 0; round < rounds; ++round) {                           \
      KTS_TWELVE(step)                                                           \
    }                                                                            \
    sum0 = last(last(sum0, sum1), last(sum2, sum3));                             \
    sum4 = last(last(sum4, sum5), last(sum6, sum7));                             \
    sum8 = last(last(sum8, sum9), last(sum10, sum11));                           \
    sum0 = last(sum0, last(sum4, sum8));                                         \
    int64_t result;                                                              \
    __builtin_memcpy(&result, &sum0, sizeof(result));                            \
    (void)x, (void)y;                                                            \
    return result;                                                               \
  }

// Inline assembly pins one instruction per step: g++ 12 spills the accumulators of some of the intrinsics.
#define KTS_FMA(i) asm("vfmadd213ps %2, %1, %0" : "+v"(sum##i) : "v"(x), "v"(y));
#define KTS_BF16(i) asm("vdpbf16ps %2, %1, %0" : "+v"(sum##i) : "v"(x), "v"(y));
#define KTS_VNNI(i) asm("vpdpbusd %2, %1, %0" : "+v"(sum##i) : "v"(x), "v"(y));
// Without a dot instruction: 16-bit products summed in pairs, then added to the 32-bit sums.
#define KTS_MADD(i)                                                                               \
  {                                                                                               \
    decltype(sum##i) pair;                                                                        \
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(sum##i), "=&v"(pair) : "v"(x), "v"(y)); \
  }

// x = 0.9 keeps the sums (sum * x + y) finite.
#define KTS_SCALE_AVX2(i) _mm256_set1_ps(0.3f * i)
#define KTS_SCALE_AVX512(i) _mm512_set1_ps(0.3f * i)
KTS_LOOP(fma_avx2, "avx2,fma", __m256, KTS_SCALE_AVX2, KTS_FMA, _mm256_add_ps)
KTS_LOOP(fma_avx512, "avx512f", __m512, KTS_SCALE_AVX512, KTS_FMA, _mm512_add_ps)
KTS_LOOP(bf16_avx512, "avx512f,avx512bf16", __m512, KTS_SCALE_AVX512, KTS_BF16, _mm512_add_ps)
KTS_LOOP(int8_avx2, "avx2", __m256i, _mm256_set1_epi16, KTS_MADD, _mm256_add_epi32)
KTS_LOOP(int8_avx512, "avx512f,avx512bw", __m512i, _mm512_set1_epi16, KTS_MADD, _mm512_add_epi32)
KTS_LOOP(int8_vnni, "avx512f,avx512vnni", __m512i, _mm512_set1_epi32, KTS_VNNI, _mm512_add_epi32)

// Layout of LDTILECFG's operand (Intel SDM vol. 2, LDTILECFG): palette 1, all eight tiles 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Four sums hide the latency of one product: tiles 0-3 are sums, 4-7 operands.
#define KTS_AMX_LOOP(name, isa, product)                                \
  __attribute__((target(isa), noinline)) int64_t name(int64_t rounds) { \
    const TileConfig config;                                            \
    alignas(64) char bytes[1024] = {};                                  \
    _tile_loadconfig(&config);                                          \
    _tile_zero(0);                                                      \
    _tile_zero(1);                                                      \
    _tile_zero(2);                                                      \
    _tile_zero(3);                                                      \
    _tile_loadd(4, bytes, 64);                                          \
    _tile_loadd(5, bytes, 64);                                          \
    _tile_loadd(6, bytes, 64);                                          \
    _tile_loadd(7, bytes, 64);                                          \
    for (int64_t round = 0; round < rounds; ++round) {                  \
      product(0, 4, 6);                                                 \
      product(1, 4, 7);                                                 \
      product(2, 5, 6);                                                 \
      product(3, 5, 7);                                                 \
    }                                                                   \
    _tile_stored(0, bytes, 64);                                         \
    _tile_release();                                                    \
    return bytes[0];                                                    \
  }
KTS_AMX_LOOP(bf16_amx, "amx-tile,amx-bf16", _tile_dpbf16ps)
KTS_AMX_LOOP(int8_amx, "amx-tile,amx-int8", _tile_dpbssd)

// CPUID leaf 7: bits of sub-leaf 0 and 1 (Intel SDM vol. 2, CPUID).
bool leaf7(unsigned subleaf, char reg, int bit) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, subleaf, &a, &b, &c, &d)) return false;
  return (reg == 'a' ? a : reg == 'c' ? c : d) >> bit & 1;
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"); }
bool has_vnni() { return has_avx512() && leaf7(0, 'c', 11); }
bool has_bf16() { return has_avx512() && leaf7(1, 'a', 5); }
// Linux hands out the tile state on request only: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
bool has_tiles() {
  static const bool granted = leaf7(0, 'd', 24) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
}
bool has_amx_bf16() { return has_tiles() && leaf7(0, 'd', 22); }
bool has_amx_int8() { return has_tiles() && leaf7(0, 'd', 25); }

struct Unit {
  bool (*present)();
  int64_t (*loop)(int64_t rounds);
  double ops_per_round;
};
// Order as roofline.UNITS. A tile product is 16 x 16 sums of 32 (bf16) or 64 (int8) products.
constexpr Unit kUnits[] = {
    {has_avx2, fma_avx2, 2.0 * 12 * 8},           {has_avx512, fma_avx512, 2.0 * 12 * 16},
    {has_avx2, int8_avx2, 2.0 * 12 * 16},         {has_avx512, int8_avx512, 2.0 * 12 * 32},
    {has_vnni, int8_vnni, 2.0 * 12 * 64},         {has_bf16, bf16_avx512, 2.0 * 12 * 32},
    {has_amx_bf16, bf16_amx, 2.0 * 4 * 256 * 32}, {has_amx_int8, int8_amx, 2.0 * 4 * 256 * 64},
};

// One 8-byte load per cache line would already move the line; 4 x 32 bytes keep the load ports as busy as a GEMV does.
__attribute__((target("avx2"), noinline)) uint64_t read_lines(const char* data, size_t bytes) {
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  for (size_t at = 0; at + 128 <= bytes; at += 128) {
    const __m256i* line = reinterpret_cast<const __m256i*>(data + at);
    _mm_prefetch(data + at + 2048, _MM_HINT_T0);
    _mm_prefetch(data + at + 2112, _MM_HINT_T0);
    a = _mm256_xor_si256(a, _mm256_load_si256(line));
    b = _mm256_xor_si256(b, _mm256_load_si256(line + 1));
    c = _mm256_xor_si256(c, _mm256_load_si256(line + 2));
    d = _mm256_xor_si256(d, _mm256_load_si256(line + 3));
  }
  return static_cast<uint64_t>(
      _mm256_extract_epi64(_mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d)), 0));
}

// Seconds from the common start to the end of the slowest of `threads` calls of work(index); the caller is thread 0.
template <typename Work>
double timed_on_threads(int threads, Work work) {
  std::atomic<int> arrived{0};
  std::vector<double> seconds(threads);
  auto body = [&](int index) {
    arrived.fetch_add(1);
    while (arrived.load() < threads) std::this_thread::yield();
    const Clock::time_point start = Clock::now();
    work(index);
    seconds[index] = seconds_since(start);
  };
  std::vector<std::thread> others;
  for (int index = 1; index < threads; ++index) others.emplace_back(body, index);
  body(0);
  for (std::thread& other : others) other.join();
  double slowest = 0;
  for (double one : seconds) slowest = one > slowest ? one : slowest;
  return slowest;
}

std::atomic<uint64_t> sink{0};  // keeps results alive

}  // namespace

extern "C" {

// Whether this CPU and operating system can run unit number `unit`.
int kts_probe_has(int unit) {
  __builtin_cpu_init();
  return kUnits[unit].present();
}

double kts_probe_ops_per_round(int unit) { return kUnits[unit].ops_per_round; }

// Operations per second of `rounds` rounds on each of `threads` threads; only where kts_probe_has(unit).
double kts_probe_unit(int unit, int threads, int64_t rounds) {
  const double seconds = timed_on_threads(threads, [&](int) { sink.fetch_add(kUnits[unit].loop(rounds)); });
  return threads * kUnits[unit].ops_per_round * rounds / seconds;
}

// A buffer of `bytes` (a multiple of 2 MiB) on huge pages if the system has them; touched by `threads` threads, so that
// its pages spread over the memory nodes as the readers do. Null when memory is short. Lives until the process ends.
char* kts_probe_buffer(size_t bytes, int threads) {
  void* memory = std::aligned_alloc(size_t{2} << 20, bytes);
  if (memory == nullptr) return nullptr;
  madvise(memory, bytes, MADV_HUGEPAGE);
  char* data = static_cast<char*>(memory);
  const size_t share = bytes / threads;
  timed_on_threads(threads, [&](int index) {
    const size_t end = index + 1 == threads ? bytes : (index + 1) * share;
    for (size_t at = index * share; at < end; at += 64) data[at] = static_cast<char>(at >> 6);
  });
  return data;
}

// Bytes per second read from data[0, bytes) by `threads` threads, each its own contiguous part.
double kts_probe_dram(const char* data, size_t bytes, int threads) {
  const size_t share = bytes / threads / 4096 * 4096;
  const double seconds =
      timed_on_threads(threads, [&](int index) { sink.fetch_add(read_lines(data + index * share, share)); });
  return static_cast<double>(share) * threads / seconds;
}

}  // extern "C"
