// Executes AMX, AVX512-BF16 and AVX512-VNNI instructions that the CPU lacks: a SIGILL handler that decodes them (decode.h)
// and works on the registers of the interrupted thread (signal_frame.h, execute.h). Needs AVX-512, whose registers the
// operands are. For tests: linked into kts_tests (KTS_EMULATE) or preloaded as a shared library. A run of emulated
// instructions costs one signal.
#include "amx_sigill.h"

#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>

#include "decode.h"
#include "execute.h"
#include "signal_frame.h"

KtsEmulatorCounts kts_emulator_counts;

namespace kts_emulator {
namespace {

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

__attribute__((constructor)) void install() {
  if (!has_avx512()) return;
  find_vectors();
  struct sigaction action = {};
  action.sa_sigaction = on_sigill;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace
}  // namespace kts_emulator

// Bits of native/include/kts/isa.h: avx512_vnni, avx512_bf16, amx_bf16, amx_int8.
extern "C" unsigned kts_emulated_isa() {
  return kts_emulator::has_avx512() ? 1u << 3 | 1u << 4 | 1u << 5 | 1u << 6 : 0u;
}
