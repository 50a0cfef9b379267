// Keys of the dropout decisions. Element (pair, col) of stream s is kept iff hash(key(seed, s, pair), col) >> 8 >= p *
// 2^24; the hash is dropout_hash in arch/elementwise_inl.h. Nothing is stored: forward, recompute and backward ask
// again.
#pragma once
#include <cstdint>

#include "kts/elementwise.h"
#include "kts/moe.h"

namespace kts {

enum class DropoutStream : uint64_t { kHidden = 1, kInter = 2 };  // the input of gate and up; the input of down

inline uint64_t mix64(uint64_t z) {  // finaliser of SplitMix64 (Steele, Lea, Flood 2014)
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

inline RowMask row_mask(const Dropout& dropout, DropoutStream stream, uint64_t pair) {
  const uint64_t key = mix64(mix64(dropout.seed + static_cast<uint64_t>(stream) * 0x9e3779b97f4a7c15ull) + pair);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), static_cast<int32_t>(dropout.p * 16777216.0)};
}

}  // namespace kts
