// Asking for packed weights while a micro-kernel computes. Lines are asked for in the order of memory, a few at a time and
// evenly: bursts stop the core as soon as its line buffers are full, and tiles in turn cost up to half of the bandwidth.
#pragma once
#include "kts/packed.h"

namespace kts {

// Weights that stream by are asked for this far ahead along a panel: the hardware's streams stop at page ends.
constexpr int64_t kPrefetchBytes = 4096;

// For kernels whose weights are in the caches.
struct NoAhead {
  KTS_MEMBER void step() const {}
};

// For kernels that read each weight once: at every step as many lines as it uses of each panel.
class StreamAhead {
 public:
  static constexpr bool kOncePerLine = true;
  StreamAhead(const uint8_t* from, int64_t panel_bytes) : at_(from), panel_bytes_(panel_bytes) {}

  template <int kPanels, int kLines>
  KTS_MEMBER void step() {
#pragma GCC unroll 16
    for (int line = 0; line < kPanels * kLines; ++line)
      __builtin_prefetch(at_ + line / kLines * panel_bytes_ + line % kLines * 64);
    at_ += kLines * 64;
  }

 private:
  const uint8_t* at_;
  int64_t panel_bytes_;
};

// For kernels that read weights several times: `panels` pieces of `bytes` bytes, panel_bytes apart, spread over `steps`
// steps. from: of the first piece.
class RegionAhead {
 public:
  static constexpr bool kOncePerLine = false;
  RegionAhead(const uint8_t* from, int64_t panels, int64_t bytes, int64_t panel_bytes, int64_t steps)
      : at_(from),
        panel_lines_(bytes / 64),
        left_(panel_lines_),
        skip_(panel_bytes - bytes),
        lines_(panels * panel_lines_) {
    per_step_ = ceil_div(lines_, steps);
    interval_ = wait_ = lines_ == 0 ? INT64_MAX : per_step_ > 1 ? 1 : steps / lines_;
  }

  KTS_MEMBER void step() {
    if (--wait_ == 0) ask();
  }
  template <int, int>
  KTS_MEMBER void step() {
    step();
  }

 private:
  KTS_MEMBER void ask() {
    wait_ = interval_;
    for (int64_t i = 0; i < per_step_; ++i) {
      __builtin_prefetch(at_);
      at_ += 64;
      if (--left_ == 0) left_ = panel_lines_, at_ += skip_;
    }
    lines_ -= per_step_;
    if (lines_ <= 0) wait_ = INT64_MAX;
  }

  const uint8_t* at_;
  int64_t panel_lines_, left_, skip_, lines_, per_step_, interval_, wait_;
};

}  // namespace kts
