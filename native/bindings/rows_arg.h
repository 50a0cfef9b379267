// Names of what the rows of a product are (kts/gemm.h).
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "kts/gemm.h"

namespace kts {

inline const char* rows_name(Rows rows) {
  return rows == Rows::kBf16 ? "bf16" : rows == Rows::kInt8 ? "int8" : "bfp16";
}

// Raises ValueError for an unknown name.
inline Rows rows_from_name(const std::string& name) {
  for (const Rows rows : {Rows::kBf16, Rows::kInt8, Rows::kBfp16})
    if (name == rows_name(rows)) return rows;
  throw pybind11::value_error("rows: expected bf16, bfp16 or int8, got " + name);
}

}  // namespace kts
