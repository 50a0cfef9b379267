#include "decode.h"

#include <cstring>

namespace kts_emulator {
namespace {

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

}  // namespace

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

}  // namespace kts_emulator
