#pragma once
#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

namespace kts {

// When the interpreter shuts down while a daemon thread computes (a chat that generates in the background), Python unwinds
// the thread's C++ frames at its next wait for the GIL, and the first destructor on the way aborts the process. Here such
// a thread sleeps until the process is gone, as Python does itself from 3.14 on.

// fn(), which may wait for the GIL: it runs Python code.
template <class Fn>
auto call_python(Fn&& fn) {
  try {
    return fn();
  } catch (abi::__forced_unwind&) {
    for (;;) pause();
  }
}

// Releases the GIL for a scope.
class GilRelease {
 public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  ~GilRelease() {
    try {
      PyEval_RestoreThread(state_);
    } catch (abi::__forced_unwind&) {
      for (;;) pause();
    }
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace kts
