// Blocks of foreign formats to numbers: checks arguments, releases the GIL, spreads rows over the threads.
#include <mutex>
#include <string>

#include "bindings.h"
#include "gil.h"
#include "kts/gguf_blocks.h"
#include "kts/scaled_blocks.h"
#include "kts/thread_pool.h"
#include "tensor_arg.h"

namespace py = pybind11;

namespace kts {

namespace {

constexpr int64_t kTaskElements = 1 << 16;

const GgmlType& type_of(const std::string& name) {
  const GgmlType* type = find_ggml_type(name.c_str());
  if (type == nullptr) throw py::value_error("type: expected a GGUF type of numbers, got " + name);
  return *type;
}

bool is_bf16(const TensorArg& out) { return out.dtype()[0] == 'b'; }

TensorArg out_arg(const py::object& tensor) {
  TensorArg out(tensor, "out", "float", 2);
  if (std::string(out.dtype()) == "f16") out.refuse("dtype bf16 or f32");
  return out;
}

// fn(first row, rows) for all rows, on all threads and without the GIL.
void over_rows(int64_t rows, int64_t cols, FunctionRef<void(int64_t, int64_t)> fn) {
  const GilRelease release;
  const int64_t step = cols < kTaskElements ? kTaskElements / (cols < 1 ? 1 : cols) : 1;
  const std::lock_guard<std::mutex> lock(runtime().mutex);
  runtime().pool->parallel_for(ceil_div(rows, step),
                               [&](int64_t task, int) { fn(task * step, min_i64(step, rows - task * step)); });
}

NumbersOut from_row(const TensorArg& out, int64_t row) {
  const int64_t at = row * out.stride(0);
  if (is_bf16(out)) return {out.bf16() + at, nullptr, out.stride(0)};
  return {nullptr, out.f32() + at, out.stride(0)};
}

void fp8(const py::object& w_, const py::object& scales_, int64_t block_rows, int64_t block_cols,
         const py::object& out_) {
  const TensorArg w(w_, "w", "u8", 2), scales(scales_, "scales", "f32", 2), out = out_arg(out_);
  KTS_CHECK(block_rows > 0 && block_cols > 0, "dequantize_fp8: expected blocks of at least one element");
  scales.expect_shape({ceil_div(w.size(0), block_rows), ceil_div(w.size(1), block_cols)});
  out.expect_shape({w.size(0), w.size(1)});
  over_rows(w.size(0), w.size(1), [&](int64_t row, int64_t rows) {
    const Fp8Blocks from{w.u8() + row * w.stride(0), w.stride(0), scales.f32(),
                         scales.stride(0),           block_rows,  block_cols};
    dequantize_fp8(from, row, rows, w.size(1), from_row(out, row));
  });
}

void int4(const py::object& w_, const py::object& scales_, int64_t group, const py::object& out_) {
  const TensorArg w(w_, "w", "u8", 2), scales(scales_, "scales", "f32", 2), out = out_arg(out_);
  KTS_CHECK(group > 0, "dequantize_int4: expected groups of at least one element");
  scales.expect_shape({w.size(0), ceil_div(2 * w.size(1), group)});
  out.expect_shape({w.size(0), 2 * w.size(1)});
  over_rows(w.size(0), out.size(1), [&](int64_t row, int64_t rows) {
    const Int4Groups from{w.u8() + row * w.stride(0), w.stride(0), scales.f32() + row * scales.stride(0),
                          scales.stride(0), group};
    dequantize_int4(from, rows, out.size(1), from_row(out, row));
  });
}

void mxfp4(const py::object& w_, const py::object& scales_, const py::object& out_) {
  const TensorArg w(w_, "w", "u8", 2), scales(scales_, "scales", "u8", 2), out = out_arg(out_);
  if (w.size(1) % 16 != 0) w.refuse("rows of whole groups of 16 bytes");
  scales.expect_shape({w.size(0), w.size(1) / 16});
  out.expect_shape({w.size(0), 2 * w.size(1)});
  over_rows(w.size(0), out.size(1), [&](int64_t row, int64_t rows) {
    const Mxfp4Groups from{w.u8() + row * w.stride(0), w.stride(0), scales.u8() + row * scales.stride(0),
                           scales.stride(0)};
    dequantize_mxfp4(from, rows, out.size(1), from_row(out, row));
  });
}

void dequantize(const std::string& name, const py::object& blocks_, const py::object& out_) {
  const GgmlType& type = type_of(name);
  const TensorArg blocks(blocks_, "blocks", "u8", 2), out = out_arg(out_);
  const int64_t rows = blocks.size(0), row_bytes = blocks.size(1);
  if (row_bytes % type.block_bytes != 0) blocks.refuse("rows of whole " + name + " blocks");
  const int64_t cols = row_bytes / type.block_bytes * type.block_elements;
  out.expect_shape({rows, cols});
  over_rows(rows, cols, [&](int64_t begin, int64_t count) {
    const uint8_t* from = blocks.u8() + begin * blocks.stride(0);
    const int64_t at = begin * out.stride(0);
    if (is_bf16(out))
      dequantize_gguf(type, from, blocks.stride(0), count, cols, out.bf16() + at, out.stride(0));
    else
      dequantize_gguf(type, from, blocks.stride(0), count, cols, out.f32() + at, out.stride(0));
  });
}

}  // namespace

void bind_quant(py::module_& m) {
  m.def("dequantize_gguf", &dequantize, py::arg("type"), py::arg("blocks"), py::arg("out"));
  m.def("dequantize_fp8", &fp8, py::arg("w"), py::arg("scales"), py::arg("block_rows"), py::arg("block_cols"),
        py::arg("out"));
  m.def("dequantize_int4", &int4, py::arg("w"), py::arg("scales"), py::arg("group"), py::arg("out"));
  m.def("dequantize_mxfp4", &mxfp4, py::arg("w"), py::arg("scales"), py::arg("out"));
  m.def("can_dequantize_gguf", [](const std::string& name) { return find_ggml_type(name.c_str()) != nullptr; });
}

}  // namespace kts
