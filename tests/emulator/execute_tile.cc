// AMX. Whatever would fault in the CPU for reasons of tile configuration ends the process with a message.
#include "execute.h"

namespace kts_emulator {
namespace {

constexpr int kTileRows = 16, kRowBytes = 64;

struct Tiles {
  bool configured = false;
  uint8_t rows[8] = {};
  uint16_t row_bytes[8] = {};
  alignas(64) uint8_t data[8][kTileRows][kRowBytes] = {};
};
// The static model: no allocation in the handler, also when the library is preloaded.
__attribute__((tls_model("initial-exec"))) thread_local Tiles tiles;

void configured(int tile) {
  if (!tiles.configured) die("a tile is used before LDTILECFG");
  if (tiles.rows[tile] == 0 || tiles.row_bytes[tile] == 0) die("a tile is used that the configuration leaves out");
}

void load_config(const uint8_t* from) {
  count(&kts_emulator_counts.ldtilecfg);
  if (from[0] != 1) die("LDTILECFG: palette is not 1");
  if (from[1] != 0) die("LDTILECFG: start_row is not 0");
  for (int i = 2; i < 64; ++i)
    if ((i < 16 || (i >= 32 && i < 48) || i >= 56) && from[i] != 0) die("LDTILECFG: a reserved byte is not 0");
  tiles = Tiles();
  tiles.configured = true;
  for (int t = 0; t < 8; ++t) {
    std::memcpy(&tiles.row_bytes[t], from + 16 + 2 * t, 2);
    tiles.rows[t] = from[48 + t];
    if (tiles.rows[t] > kTileRows) die("LDTILECFG: more than 16 rows");
    if (tiles.row_bytes[t] > kRowBytes) die("LDTILECFG: rows of more than 64 bytes");
    if ((tiles.rows[t] == 0) != (tiles.row_bytes[t] == 0)) die("LDTILECFG: a tile with only one side");
  }
}

void move_tile(const Instruction& in, bool store) {
  const int tile = in.reg;
  configured(tile);
  count(store ? &kts_emulator_counts.tilestored : &kts_emulator_counts.tileloadd);
  if (!store) std::memset(tiles.data[tile], 0, sizeof(tiles.data[tile]));
  // The index register, scaled, is the stride; the base does not include it.
  const uint64_t stride = in.index * static_cast<uint64_t>(in.scale);
  uint8_t* row = reinterpret_cast<uint8_t*>(in.base + static_cast<uint64_t>(in.displacement));
  for (int r = 0; r < tiles.rows[tile]; ++r, row += stride) {
    if (store)
      std::memcpy(row, tiles.data[tile][r], tiles.row_bytes[tile]);
    else
      std::memcpy(tiles.data[tile][r], row, tiles.row_bytes[tile]);
  }
}

void check_dot(int c, int a, int b) {
  configured(c), configured(a), configured(b);
  if (a == b || a == c || b == c) die("a dot product names a tile twice");
  if (tiles.rows[c] != tiles.rows[a]) die("a dot product's result and first operand differ in rows");
  if (tiles.row_bytes[c] != tiles.row_bytes[b]) die("a dot product's result and second operand differ in row bytes");
  if (tiles.row_bytes[a] != 4 * tiles.rows[b]) die("a dot product's operands do not fit");
  if (tiles.row_bytes[b] % 4 != 0) die("a dot product's second operand has partial dwords");
}

// Even and odd elements are summed apart, then added (SDM, TDPBF16PS).
__attribute__((target("avx2,fma"), optimize("O3"))) void dot_bf16(int c, int a, int b) {
  check_dot(c, a, b);
  count(&kts_emulator_counts.tdpbf16ps);
  float even_b[16][16], odd_b[16][16];
  for (int t = 0; t < 16; ++t)
    for (int j = 0; j < 16; ++j) {
      uint32_t pair;
      std::memcpy(&pair, tiles.data[b][t] + 4 * j, 4);
      even_b[t][j] = widen(static_cast<uint16_t>(pair));
      odd_b[t][j] = widen(static_cast<uint16_t>(pair >> 16));
    }
  for (int i = 0; i < tiles.rows[c]; ++i) {
    float even[16] = {}, odd[16] = {}, sum[16];
    for (int t = 0; t < tiles.rows[b]; ++t) {
      uint16_t pair[2];
      std::memcpy(pair, tiles.data[a][i] + 4 * t, 4);
      const float x = widen(pair[0]), y = widen(pair[1]);
      for (int j = 0; j < 16; ++j) even[j] = __builtin_fmaf(x, even_b[t][j], even[j]);
      for (int j = 0; j < 16; ++j) odd[j] = __builtin_fmaf(y, odd_b[t][j], odd[j]);
    }
    std::memcpy(sum, tiles.data[c][i], 64);
    for (int j = 0; j < 16; ++j) sum[j] += even[j] + odd[j];
    std::memcpy(tiles.data[c][i], sum, tiles.row_bytes[c]);
  }
}

__attribute__((target("avx2"), optimize("O3"))) void dot_s8(int c, int a, int b) {
  check_dot(c, a, b);
  count(&kts_emulator_counts.tdpbssd);
  for (int i = 0; i < tiles.rows[c]; ++i) {
    int32_t sum[16];
    std::memcpy(sum, tiles.data[c][i], 64);
    for (int t = 0; t < tiles.rows[b]; ++t)
      for (int byte = 0; byte < 4; ++byte) {
        const int x = static_cast<int8_t>(tiles.data[a][i][4 * t + byte]);
        for (int j = 0; j < 16; ++j) sum[j] += x * static_cast<int8_t>(tiles.data[b][t][4 * j + byte]);
      }
    std::memcpy(tiles.data[c][i], sum, tiles.row_bytes[c]);
  }
}

}  // namespace

bool execute_tile(const Instruction& in) {
  if (in.wide || in.bytes != 16) return false;
  const int tile = in.reg & 7;
  switch (in.opcode << 4 | in.prefix) {
    case 0x490:
      if (in.memory) {
        load_config(in.address());
      } else {
        count(&kts_emulator_counts.tilerelease);
        tiles = Tiles();
      }
      return true;
    case 0x493:
      configured(tile);
      count(&kts_emulator_counts.tilezero);
      std::memset(tiles.data[tile], 0, sizeof(tiles.data[tile]));
      return true;
    case 0x4b3:
      move_tile(in, false);
      return true;
    case 0x4b2:
      move_tile(in, true);
      return true;
    case 0x5c2:
      dot_bf16(tile, in.rm & 7, in.vvvv & 7);
      return true;
    case 0x5e3:
      dot_s8(tile, in.rm & 7, in.vvvv & 7);
      return true;
    default:
      return false;
  }
}

}  // namespace kts_emulator
