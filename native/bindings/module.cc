#include <pybind11/pybind11.h>

#include "bindings.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Expert kernels of kt_sft. Use kt_sft.native.native() to get this module.";
  m.def("version", [] { return KTS_VERSION; });
  kts::bind_runtime(m);
  kts::bind_moe(m);
}
