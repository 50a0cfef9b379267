#include <pybind11/pybind11.h>

#include "bindings.h"
#include "kts/gemm.h"
#include "kts/thread_pool.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Expert kernels of kt_sft. Use kt_sft.native.native() to get this module.";
  m.def("version", [] { return KTS_VERSION; });
  kts::set_phase_end(&kts::gemm_end_phase);
  kts::bind_runtime(m);
  kts::bind_kernels(m);
  kts::bind_store(m);
  kts::bind_moe(m);
  kts::bind_lora(m);
  kts::bind_linear(m);
  kts::bind_quant(m);
}
