// TileOp = plain C++ of the same meaning, so that the nest runs on any CPU; for tests. Counts what it does and notes the
// use of tiles that are not configured.
//
// Sums follow the manual's order: TDPBF16PS sums even and odd elements apart with fused multiply-adds, adds the two and
// then adds that to c. Denormals are flushed as inputs and results.
#pragma once
#include <cmath>
#include <cstring>

#include "kts/types.h"
#include "tile_config.h"

namespace kts::amx {

struct TileCounts {
  int64_t configures = 0, zeros = 0, loads = 0, stores = 0, dots = 0;
  int64_t faults = 0;  // uses of a tile that is not configured
};

struct TileOpModel {
  struct State {
    TileShape shape = TileShape::kNone;
    alignas(64) uint8_t bytes[kTiles][kFullTileBytes] = {};
    TileCounts counts;
  };
  static State& state() {
    thread_local State s;
    return s;
  }

  static void configure(TileShape shape) {
    if (state().shape == shape) return;
    state().shape = shape;
    ++state().counts.configures;
    std::memset(state().bytes, 0, sizeof(state().bytes));
  }
  static void release() { state().shape = TileShape::kNone; }

  template <int T>
  static void zero() {
    check();
    ++state().counts.zeros;
    std::memset(state().bytes[T], 0, kFullTileBytes);
  }
  template <int T>
  static void load(const void* from, int64_t stride_bytes) {
    check();
    ++state().counts.loads;
    std::memset(state().bytes[T], 0, kFullTileBytes);
    for (int r = 0; r < tile_rows(state().shape, T); ++r)
      std::memcpy(state().bytes[T] + r * kTileRowBytes, static_cast<const uint8_t*>(from) + r * stride_bytes,
                  static_cast<size_t>(tile_row_bytes(state().shape, T)));
  }
  template <int T>
  static void store(void* to, int64_t stride_bytes) {
    check();
    ++state().counts.stores;
    for (int r = 0; r < tile_rows(state().shape, T); ++r)
      std::memcpy(static_cast<uint8_t*>(to) + r * stride_bytes, state().bytes[T] + r * kTileRowBytes,
                  static_cast<size_t>(tile_row_bytes(state().shape, T)));
  }
  template <int C, int A, int B>
  static void dot_bf16() {
    check();
    ++state().counts.dots;
    for (int i = 0; i < tile_rows(state().shape, A); ++i)
      for (int j = 0; j < 16; ++j) {
        float even = 0.0f, odd = 0.0f;
        for (int t = 0; t < tile_row_bytes(state().shape, A) / 4; ++t) {
          even = flushed(std::fma(bf16(A, i, 2 * t), bf16(B, t, 2 * j), even));
          odd = flushed(std::fma(bf16(A, i, 2 * t + 1), bf16(B, t, 2 * j + 1), odd));
        }
        float* c = element<float>(C, i, j);
        *c = flushed(flushed(*c) + flushed(even + odd));
      }
  }
  template <int C, int A, int B>
  static void dot_s8() {
    check();
    ++state().counts.dots;
    for (int i = 0; i < tile_rows(state().shape, A); ++i)
      for (int j = 0; j < 16; ++j) {
        int32_t sum = 0;
        for (int t = 0; t < tile_row_bytes(state().shape, A); ++t)
          sum += *element<int8_t>(A, i, t) * *element<int8_t>(B, t / 4, 4 * j + t % 4);
        *element<int32_t>(C, i, j) += sum;
      }
  }

 private:
  static void check() {
    if (state().shape == TileShape::kNone) ++state().counts.faults;
  }
  static float flushed(float v) { return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.0f, v) : v; }
  template <class T>
  static T* element(int tile, int row, int col) {
    return reinterpret_cast<T*>(state().bytes[tile] + row * kTileRowBytes) + col;
  }
  static float bf16(int tile, int row, int col) { return flushed(bf16_to_f32(*element<bf16_t>(tile, row, col))); }
};

}  // namespace kts::amx
