// Blocks of foreign formats to numbers: checks arguments, releases the GIL, spreads rows over the threads.
#include <algorithm>
#include <mutex>
#include <string>

#include "bindings.h"
#include "gil.h"
#include "kts/gguf_blocks.h"
#include "kts/scaled_blocks.h"
#include "kts/thread_pool.h"
#include "plain_arg.h"
#include "tensor_arg.h"

namespace py = pybind11;

namespace kts {

namespace {

constexpr int64_t kTaskElements = 1 << 16;

using TypeName = Text<"type">;

const GgmlType& type_of(const TypeName& name) {
  const GgmlType* type = find_ggml_type(name.c_str());
  if (type == nullptr) throw py::value_error("type: expected a GGUF type of numbers, got " + name.value);
  return *type;
}

TensorOut out_arg(CallMemory& call, const py::object& tensor, int64_t rows, int64_t cols) {
  return {call, tensor, "out", kBf16 | kF32, {rows, cols}, Layout::kRows};
}

// fn(first row, rows) for all rows, on all threads and without the GIL.
void over_rows(int64_t rows, int64_t cols, FunctionRef<void(int64_t, int64_t)> fn) {
  if (rows == 0 || cols == 0) return;
  const GilRelease release;
  const int64_t step = cols < kTaskElements ? kTaskElements / cols : 1;
  const std::lock_guard<std::mutex> lock(runtime().mutex);
  runtime().pool->parallel_for(ceil_div(rows, step),
                               [&](int64_t task, int) { fn(task * step, min_i64(step, rows - task * step)); });
}

NumbersOut from_row(NumbersOut out, int64_t row) {
  if (out.bf16 != nullptr) out.bf16 += row * out.stride;
  if (out.f32 != nullptr) out.f32 += row * out.stride;
  return out;
}

// The size of a block along an axis of `count`, all of it if that is less: sums of larger numbers would overflow.
int64_t block_size(const char* name, int64_t size, int64_t count) {
  if (size <= 0)
    throw py::value_error(std::string(name) + ": expected at least one element, got " + std::to_string(size));
  return min_i64(size, std::max<int64_t>(count, 1));
}

void fp8(const py::object& w_, const py::object& scales_, Number<"block_rows"> wanted_rows,
         Number<"block_cols"> wanted_cols, const py::object& out_) {
  CallMemory call;
  const TensorIn w(call, w_, "w", kU8, {kAnySize, kAnySize}, Layout::kRows);
  const int64_t rows = w.size(0), cols = w.size(1);
  const int64_t block_rows = block_size("block_rows", wanted_rows, rows);
  const int64_t block_cols = block_size("block_cols", wanted_cols, cols);
  const TensorIn scales(call, scales_, "scales", kF32, {ceil_div(rows, block_rows), ceil_div(cols, block_cols)},
                        Layout::kRows);
  const TensorOut out = out_arg(call, out_, rows, cols);
  const auto to = out.as_output<NumbersOut>(out.stride(0));
  const Fp8Blocks all{w.u8(), w.stride(0), scales.f32(), scales.stride(0), block_rows, block_cols};
  over_rows(rows, cols, [&](int64_t row, int64_t count) {
    Fp8Blocks from = all;
    from.w += row * from.stride;
    dequantize_fp8(from, row, count, cols, from_row(to, row));
  });
}

void int4(const py::object& w_, const py::object& scales_, Number<"group"> wanted, const py::object& out_) {
  CallMemory call;
  const TensorIn w(call, w_, "w", kU8, {kAnySize, kAnySize}, Layout::kRows);
  const int64_t rows = w.size(0), cols = 2 * w.size(1);
  const int64_t group = block_size("group", wanted, cols);
  const TensorIn scales(call, scales_, "scales", kF32, {rows, ceil_div(cols, group)}, Layout::kRows);
  const TensorOut out = out_arg(call, out_, rows, cols);
  const auto to = out.as_output<NumbersOut>(out.stride(0));
  const Int4Groups all{w.u8(), w.stride(0), scales.f32(), scales.stride(0), group};
  over_rows(rows, cols, [&](int64_t row, int64_t count) {
    Int4Groups from = all;
    from.w += row * from.stride;
    from.scales += row * from.scale_stride;
    dequantize_int4(from, count, cols, from_row(to, row));
  });
}

void mxfp4(const py::object& w_, const py::object& scales_, const py::object& out_) {
  CallMemory call;
  const TensorIn w(call, w_, "w", kU8, {kAnySize, kAnySize}, Layout::kRows);
  if (w.size(1) % 16 != 0) w.refuse("rows of whole groups of 16 bytes");
  const int64_t rows = w.size(0), cols = 2 * w.size(1);
  const TensorIn scales(call, scales_, "scales", kU8, {rows, w.size(1) / 16}, Layout::kRows);
  const TensorOut out = out_arg(call, out_, rows, cols);
  const auto to = out.as_output<NumbersOut>(out.stride(0));
  const Mxfp4Groups all{w.u8(), w.stride(0), scales.u8(), scales.stride(0)};
  over_rows(rows, cols, [&](int64_t row, int64_t count) {
    Mxfp4Groups from = all;
    from.w += row * from.stride;
    from.scales += row * from.scale_stride;
    dequantize_mxfp4(from, count, cols, from_row(to, row));
  });
}

void dequantize(const TypeName& name, const py::object& blocks_, const py::object& out_) {
  const GgmlType& type = type_of(name);
  CallMemory call;
  const TensorIn blocks(call, blocks_, "blocks", kU8, {kAnySize, kAnySize}, Layout::kRows);
  const int64_t rows = blocks.size(0), row_bytes = blocks.size(1);
  if (row_bytes % type.block_bytes != 0) blocks.refuse("rows of whole " + name.value + " blocks");
  const int64_t cols = row_bytes / type.block_bytes * type.block_elements;
  const TensorOut out = out_arg(call, out_, rows, cols);
  const auto to = out.as_output<NumbersOut>(out.stride(0));
  const uint8_t* all = blocks.u8();
  over_rows(rows, cols, [&](int64_t row, int64_t count) {
    const uint8_t* from = all + row * blocks.stride(0);
    const NumbersOut here = from_row(to, row);
    if (here.bf16 != nullptr)
      dequantize_gguf(type, from, blocks.stride(0), count, cols, here.bf16, here.stride);
    else
      dequantize_gguf(type, from, blocks.stride(0), count, cols, here.f32, here.stride);
  });
}

}  // namespace

void bind_quant(py::module_& m) {
  m.def("dequantize_gguf", &dequantize, py::arg("type"), py::arg("blocks"), py::arg("out"));
  m.def("dequantize_fp8", &fp8, py::arg("w"), py::arg("scales"), py::arg("block_rows"), py::arg("block_cols"),
        py::arg("out"));
  m.def("dequantize_int4", &int4, py::arg("w"), py::arg("scales"), py::arg("group"), py::arg("out"));
  m.def("dequantize_mxfp4", &mxfp4, py::arg("w"), py::arg("scales"), py::arg("out"));
  m.def("can_dequantize_gguf", [](const TypeName& name) { return find_ggml_type(name.c_str()) != nullptr; });
}

}  // namespace kts
