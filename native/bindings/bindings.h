#pragma once
#include <pybind11/pybind11.h>

namespace kts {

void bind_runtime(pybind11::module_& m);
void bind_kernels(pybind11::module_& m);
void bind_store(pybind11::module_& m);
void bind_moe(pybind11::module_& m);
void bind_lora(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_quant(pybind11::module_& m);

}  // namespace kts
