// Executes AMX, AVX512-BF16 and AVX512-VNNI instructions that the CPU lacks: a SIGILL handler that decodes them and works on
// the registers of the interrupted thread, which the kernel's signal frame holds in XSAVE format. Needs AVX-512, whose
// registers the operands are. For tests: linked into kts_tests (KTS_EMULATE) or preloaded as a shared library.
//
// Decoded: LDTILECFG TILERELEASE TILEZERO TILELOADD TILESTORED TDPBF16PS TDPBSSD; without masks, 128 to 512 bits, register,
// memory and embedded broadcast: VDPBF16PS VPDPBUSD VCVTNE2PS2BF16 VCVTNEPS2BF16. Whatever would fault in the CPU for
// reasons of tile configuration ends the process with a message. A run of emulated instructions costs one signal.
#include "amx_sigill.h"

#include <cpuid.h>
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

KtsEmulatorCounts kts_emulator_counts;

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

[[noreturn]] void die(const char* message) {
  const char prefix[] = "amx_sigill: ";
  if (write(2, prefix, sizeof(prefix) - 1) < 0 || write(2, message, std::strlen(message)) < 0 || write(2, "\n", 1) < 0)
    _exit(99);
  abort();
}

void count(long* counter) { __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

// --- the interrupted thread's registers ---

struct Frame {
  greg_t* gregs;
  uint8_t* xsave;

  uint64_t reg(int number) const {
    static constexpr int kIndex[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                       REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return static_cast<uint64_t>(gregs[kIndex[number]]);
  }
};

// Offsets of the standard format: upper half of YMM, upper half of ZMM0-15, ZMM16-31.
unsigned ymm_offset, zmm_offset, high_zmm_offset;

// The 16-byte quarter `part` of vector register `number`.
uint8_t* vector_part(const Frame& frame, int number, int part) {
  if (number >= 16) return frame.xsave + high_zmm_offset + (number - 16) * 64 + part * 16;
  if (part == 0) return frame.xsave + 160 + number * 16;
  if (part == 1) return frame.xsave + ymm_offset + number * 16;
  return frame.xsave + zmm_offset + number * 32 + (part - 2) * 16;
}

void read_vector(const Frame& frame, int number, int bytes, void* to) {
  for (int part = 0; part < bytes / 16; ++part)
    std::memcpy(static_cast<uint8_t*>(to) + part * 16, vector_part(frame, number, part), 16);
}

// Bytes beyond `bytes` become zero, as every EVEX instruction does.
void write_vector(const Frame& frame, int number, int bytes, const void* from) {
  for (int part = 0; part < 4; ++part) {
    if (part < bytes / 16)
      std::memcpy(vector_part(frame, number, part), static_cast<const uint8_t*>(from) + part * 16, 16);
    else
      std::memset(vector_part(frame, number, part), 0, 16);
  }
  uint64_t in_use;  // XSTATE_BV: components whose bytes are restored
  std::memcpy(&in_use, frame.xsave + 512, sizeof(in_use));
  in_use |= 0xe6;
  std::memcpy(frame.xsave + 512, &in_use, sizeof(in_use));
}

// --- decoding ---

// VPBROADCASTD from memory is no missing instruction, but stands between most dot products: executing it here keeps them
// in one run.
constexpr int kBroadcastDword = 0x58;

struct Instruction {
  int prefix = 0;  // none, 66, F3, F2 as 0 .. 3
  uint8_t opcode = 0;
  bool evex = false, wide = false, broadcast = false, masked = false;
  int bytes = 16;  // vector length
  int reg = 0, vvvv = 0, rm = 0;
  bool memory = false;
  uint64_t base = 0;  // memory: base + displacement
  uint64_t index = 0;
  int scale = 1;
  int64_t displacement = 0;
  bool rip_relative = false;
  const uint8_t* end = nullptr;

  const uint8_t* address() const { return reinterpret_cast<const uint8_t*>(base + displacement + index * scale); }
};

template <class T>
T fetch(const uint8_t*& p) {
  T value;
  std::memcpy(&value, p, sizeof(value));
  p += sizeof(value);
  return value;
}

// ModRM and what follows it; x, b: the prefix's extension bits. disp8 counts operands of disp8_unit bytes.
void decode_operand(const Frame& frame, const uint8_t*& p, int r, int x, int b, int high_b, int disp8_unit,
                    Instruction* out) {
  const uint8_t modrm = *p++;
  const int mod = modrm >> 6, low = modrm & 7;
  out->reg = (modrm >> 3 & 7) + r;
  out->memory = mod != 3;
  if (!out->memory) {
    out->rm = low + b + high_b;
    return;
  }
  if (low == 4) {
    const uint8_t sib = *p++;
    const int index = (sib >> 3 & 7) + x;
    if (index != 4) out->index = frame.reg(index);
    out->scale = 1 << (sib >> 6);
    if ((sib & 7) == 5 && mod == 0)
      out->displacement = fetch<int32_t>(p);
    else
      out->base = frame.reg((sib & 7) + b);
  } else if (low == 5 && mod == 0) {
    out->rip_relative = true;
    out->displacement = fetch<int32_t>(p);
  } else {
    out->base = frame.reg(low + b);
  }
  if (mod == 1) out->displacement = static_cast<int64_t>(fetch<int8_t>(p)) * disp8_unit;
  if (mod == 2) out->displacement = fetch<int32_t>(p);
}

bool decode(const Frame& frame, const uint8_t* p, Instruction* out) {
  const uint8_t first = *p++;
  if (first == 0xc4) {
    const uint8_t p0 = *p++, p1 = *p++;
    if ((p0 & 31) != 2) return false;
    out->prefix = p1 & 3;
    out->wide = p1 & 0x80;
    out->vvvv = ~(p1 >> 3) & 15;
    out->opcode = *p++;
    decode_operand(frame, p, p0 & 0x80 ? 0 : 8, p0 & 0x40 ? 0 : 8, p0 & 0x20 ? 0 : 8, 0, 1, out);
  } else if (first == 0x62) {
    const uint8_t p0 = *p++, p1 = *p++, p2 = *p++;
    if ((p0 & 15) != 2 || !(p1 & 4)) return false;
    out->evex = true;
    out->prefix = p1 & 3;
    out->wide = p1 & 0x80;
    out->vvvv = (~(p1 >> 3) & 15) + (p2 & 8 ? 0 : 16);
    out->bytes = 16 << (p2 >> 5 & 3);
    out->broadcast = p2 & 16;
    out->masked = (p2 & 7) != 0 || (p2 & 0x80) != 0;
    out->opcode = *p++;
    const int high_b = p0 & 0x40 ? 0 : 16;  // of a register operand
    decode_operand(frame, p, (p0 & 0x80 ? 0 : 8) + (p0 & 0x10 ? 0 : 16), p0 & 0x40 ? 0 : 8, p0 & 0x20 ? 0 : 8, high_b,
                   out->broadcast || out->opcode == kBroadcastDword ? 4 : out->bytes, out);
  } else {
    return false;
  }
  out->end = p;
  if (out->rip_relative) out->base = reinterpret_cast<uint64_t>(p);
  return true;
}

// --- tiles ---

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

float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
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

// --- vectors ---

uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  if (magnitude < 0x00800000u) return static_cast<uint16_t>(bits >> 16 & 0x8000u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Odd elements first, each multiply-add rounded (SDM, VDPBF16PS).
__attribute__((target("avx2,fma"), optimize("O3"))) void pair_sums(float* sum, const uint16_t* a, const uint16_t* b,
                                                                   int lanes) {
  for (int i = 0; i < lanes; ++i) sum[i] = __builtin_fmaf(widen(a[2 * i + 1]), widen(b[2 * i + 1]), sum[i]);
  for (int i = 0; i < lanes; ++i) sum[i] = __builtin_fmaf(widen(a[2 * i]), widen(b[2 * i]), sum[i]);
}

bool execute_vector(const Frame& frame, const Instruction& in) {
  const int key = in.opcode << 4 | in.prefix;
  if (key == (kBroadcastDword << 4 | 1) && !in.wide && in.memory && !in.masked && in.bytes <= 64) {
    alignas(64) uint8_t dest[64];
    for (int i = 0; i < in.bytes; i += 4) std::memcpy(dest + i, in.address(), 4);
    write_vector(frame, in.reg, in.bytes, dest);
    return true;
  }
  if (in.wide || in.bytes > 64 || (key != 0x522 && key != 0x501 && key != 0x723 && key != 0x722)) return false;
  if (in.masked) die("a masked instruction is not implemented");
  alignas(64) uint8_t dest[64] = {}, first[64] = {}, second[64] = {};
  read_vector(frame, in.reg, in.bytes, dest);
  read_vector(frame, in.vvvv, in.bytes, first);
  if (!in.memory) {
    read_vector(frame, in.rm, in.bytes, second);
  } else if (in.broadcast) {
    for (int i = 0; i < in.bytes; i += 4) std::memcpy(second + i, in.address(), 4);
  } else {
    std::memcpy(second, in.address(), static_cast<size_t>(in.bytes));
  }
  const int lanes = in.bytes / 4;
  float x[16], y[16];
  std::memcpy(x, second, 64), std::memcpy(y, first, 64);
  uint16_t* out = reinterpret_cast<uint16_t*>(dest);
  if (key == 0x522) {
    count(&kts_emulator_counts.vdpbf16ps);
    pair_sums(reinterpret_cast<float*>(dest), reinterpret_cast<uint16_t*>(first), reinterpret_cast<uint16_t*>(second),
              lanes);
  } else if (key == 0x501) {
    count(&kts_emulator_counts.vpdpbusd);
    int32_t* sum = reinterpret_cast<int32_t*>(dest);
    for (int i = 0; i < in.bytes; ++i) sum[i / 4] += first[i] * static_cast<int8_t>(second[i]);
  } else if (key == 0x723) {
    count(&kts_emulator_counts.vcvtneps2bf16);
    for (int i = 0; i < lanes; ++i) out[i] = narrow(x[i]), out[lanes + i] = narrow(y[i]);
  } else {
    count(&kts_emulator_counts.vcvtneps2bf16);
    for (int i = 0; i < lanes; ++i) out[i] = narrow(x[i]);
    write_vector(frame, in.reg, in.bytes / 2, dest);
    return true;
  }
  write_vector(frame, in.reg, in.bytes, dest);
  return true;
}

void on_sigill(int, siginfo_t*, void* context) {
  ucontext_t* user = static_cast<ucontext_t*>(context);
  uint8_t* xsave = reinterpret_cast<uint8_t*>(user->uc_mcontext.fpregs);
  uint32_t magic;
  std::memcpy(&magic, xsave + 464, sizeof(magic));
  if (magic != 0x46505853u) die("the signal frame holds no extended state");
  const Frame frame{user->uc_mcontext.gregs, xsave};
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // masked exceptions, round to nearest, denormals flushed: the mode of these instructions
  bool any = false;
  for (;;) {
    Instruction in;
    const uint8_t* at = reinterpret_cast<const uint8_t*>(frame.gregs[REG_RIP]);
    if (!decode(frame, at, &in) || !(in.evex ? execute_vector(frame, in) : execute_tile(in))) break;
    frame.gregs[REG_RIP] = reinterpret_cast<greg_t>(in.end);
    any = true;
  }
  _mm_setcsr(mode);
  if (any) {
    count(&kts_emulator_counts.signals);
    return;
  }
  signal(SIGILL, SIG_DFL);  // not ours: the instruction faults again
}

bool has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

unsigned component_offset(unsigned component) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  __cpuid_count(13, component, a, b, c, d);
  return b;
}

__attribute__((constructor)) void install() {
  if (!has_avx512()) return;
  ymm_offset = component_offset(2);
  zmm_offset = component_offset(6);
  high_zmm_offset = component_offset(7);
  struct sigaction action = {};
  action.sa_sigaction = on_sigill;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace

// Bits of native/include/kts/isa.h: avx512_vnni, avx512_bf16, amx_bf16, amx_int8.
extern "C" unsigned kts_emulated_isa() { return has_avx512() ? 1u << 3 | 1u << 4 | 1u << 5 | 1u << 6 : 0u; }
