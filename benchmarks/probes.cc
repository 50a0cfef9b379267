// Two limits of this machine, measured in a few milliseconds so that they can be taken beside every benchmark sample:
//   FMA   f32 fused multiply-adds per second; 12 independent chains, operands in registers
//   DRAM  bytes read per second, every cache line once, from a buffer larger than the last-level cache
// Built on demand by benchmarks/roofline.py with a baseline x86-64 compiler line; the wide loops carry their own target
// attribute and run only where CPUID allows it. Threads meet at a barrier; a rate is total work / time of the slowest.
#include <immintrin.h>
#include <sys/mman.h>

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

__attribute__((target("avx2,fma"), noinline)) float fma_loop_avx2(int64_t rounds) {
  const __m256 scale = _mm256_set1_ps(0.999f), shift = _mm256_set1_ps(1e-3f);
#define KTS_STEP(i) __m256 sum##i = _mm256_set1_ps(1.0f + i);
  KTS_TWELVE(KTS_STEP)
#undef KTS_STEP
  for (int64_t round = 0; round < rounds; ++round) {
#define KTS_STEP(i) sum##i = _mm256_fmadd_ps(sum##i, scale, shift);
    KTS_TWELVE(KTS_STEP)
#undef KTS_STEP
  }
  __m256 total = _mm256_setzero_ps();
#define KTS_STEP(i) total = _mm256_add_ps(total, sum##i);
  KTS_TWELVE(KTS_STEP)
#undef KTS_STEP
  return _mm256_cvtss_f32(total);
}

__attribute__((target("avx512f"), noinline)) float fma_loop_avx512(int64_t rounds) {
  const __m512 scale = _mm512_set1_ps(0.999f), shift = _mm512_set1_ps(1e-3f);
#define KTS_STEP(i) __m512 sum##i = _mm512_set1_ps(1.0f + i);
  KTS_TWELVE(KTS_STEP)
#undef KTS_STEP
  for (int64_t round = 0; round < rounds; ++round) {
#define KTS_STEP(i) sum##i = _mm512_fmadd_ps(sum##i, scale, shift);
    KTS_TWELVE(KTS_STEP)
#undef KTS_STEP
  }
  __m512 total = _mm512_setzero_ps();
#define KTS_STEP(i) total = _mm512_add_ps(total, sum##i);
  KTS_TWELVE(KTS_STEP)
#undef KTS_STEP
  return _mm512_cvtss_f32(total);
}

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

std::atomic<uint64_t> sink{0};

}  // namespace

extern "C" {

// Widest loop this CPU can run: 0 none, 1 AVX2 + FMA, 2 AVX-512F.
int kts_probe_level() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return 2;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
}

// f32 FLOP/s (2 per multiply-add) of `rounds` x 12 vectors on each of `threads` threads; level as above, 1 or 2.
double kts_probe_fma(int level, int threads, int64_t rounds) {
  const double lanes = level == 2 ? 16 : 8;
  const double seconds = timed_on_threads(threads, [&](int) {
    const float total = level == 2 ? fma_loop_avx512(rounds) : fma_loop_avx2(rounds);
    sink.fetch_add(static_cast<uint64_t>(total));
  });
  return threads * 2.0 * 12 * lanes * rounds / seconds;
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
