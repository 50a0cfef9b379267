// Names that arguments have: of number formats, of weights and of what the rows of a product are (kts/gemm.h). Unknown
// ones are a ValueError.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "kts/gemm.h"
#include "tensor_arg.h"

namespace kts {

inline Rows rows_from_name(const std::string& name) {
  for (const Rows rows : {Rows::kBf16, Rows::kInt8, Rows::kBfp16})
    if (name == rows_name(rows)) return rows;
  throw pybind11::value_error("rows: expected bf16, bfp16 or int8, got " + name);
}

inline const char* direction_name(Direction direction) {
  return direction == Direction::kForward ? "forward" : "input_grad";
}

inline Direction direction_from_name(const std::string& name) {
  for (const Direction direction : {Direction::kForward, Direction::kInputGrad})
    if (name == direction_name(direction)) return direction;
  throw pybind11::value_error("op: expected forward or input_grad, got " + name);
}

// Of a result, by the name that the argument gives.
inline DType result_dtype(const char* argument, const std::string& name) {
  if (name == "bf16") return kBf16;
  if (name == "f32") return kF32;
  throw pybind11::value_error(std::string(argument) + ": expected bf16 or f32, got " + name);
}

}  // namespace kts
