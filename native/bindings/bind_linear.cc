// PackedLinear: converts and checks arguments, releases the GIL, calls.
#include "kts/linear.h"

#include <memory>
#include <optional>
#include <string>

#include "bindings.h"
#include "gil.h"
#include "held.h"
#include "name_arg.h"
#include "plain_arg.h"
#include "tensor_arg.h"

namespace py = pybind11;

namespace kts {

namespace {

using HeldLinear = Held<PackedLinear>;

void load(const HeldLinear& layer, const py::object& w_) {
  CallMemory call;
  const TensorIn w(call, w_, "w", kBf16, {layer->n(), layer->k()}, Layout::kRows);
  const GilRelease release;
  layer->load(w.bf16(), w.stride(0));
}

void load_blocks(const HeldLinear& layer, const py::object& w_) {
  CallMemory call;
  const int64_t row_bytes = block_row_bytes(layer->format(), layer->k());
  const TensorIn w(call, w_, "w", kU8, {layer->n(), row_bytes}, Layout::kRows);
  const GilRelease release;
  layer->load_blocks(w.u8(), w.stride(0));
}

void unpack(const HeldLinear& layer, const py::object& out_, const Text<"dtype">& dtype) {
  CallMemory call;
  const TensorOut out(call, out_, "out", result_dtype("dtype", dtype), {layer->n(), layer->k()}, Layout::kContiguous);
  const GilRelease release;
  out.dtype() == kBf16 ? layer->unpack(out.bf16(), out.stride(0)) : layer->unpack(out.f32(), out.stride(0));
}

void forward(const HeldLinear& layer, const py::object& a_, const py::object& out_, const Text<"out_dtype">& out_dtype,
             const Text<"rows">& rows, const py::object& bias_, const Text<"kernel">& kernel) {
  CallMemory call;
  const TensorIn a(call, a_, "a", kBf16, {kAnySize, layer->k()}, Layout::kRows);
  const TensorOut out(call, out_, "out", result_dtype("out_dtype", out_dtype), {a.size(0), layer->n()},
                      Layout::kContiguous);
  std::optional<TensorIn> bias;
  if (!bias_.is_none()) bias.emplace(call, bias_, "bias", kF32, Shape{layer->n()}, Layout::kContiguous);
  const Rows kind = rows_from_name(rows);
  if (!takes_rows(layer->format().kind, kind))
    throw py::value_error("rows: " + rows.value + " needs int8 or int4 weights, this layer has " +
                          format_name(layer->format()) + " weights");
  const GilRelease release;
  layer->forward(a.bf16(), a.stride(0), a.size(0), kind, bias ? bias->f32() : nullptr, kernel.c_str(),
                 out.as_output<LinearOutput>(out.stride(0)));
}

void input_grad(const HeldLinear& layer, const py::object& dy_, const py::object& out_,
                const Text<"out_dtype">& out_dtype, const Text<"kernel">& kernel) {
  CallMemory call;
  const TensorIn dy(call, dy_, "dy", kBf16, {kAnySize, layer->n()}, Layout::kRows);
  const TensorOut out(call, out_, "out", result_dtype("out_dtype", out_dtype), {dy.size(0), layer->k()},
                      Layout::kContiguous);
  const GilRelease release;
  layer->input_grad(dy.bf16(), dy.stride(0), dy.size(0), kernel.c_str(), out.as_output<LinearOutput>(out.stride(0)));
}

}  // namespace

void bind_linear(py::module_& m) {
  py::class_<HeldLinear>(m, "PackedLinear")
      .def(py::init(
               [](Number<"n"> n, Number<"k"> k, const Text<"format">& format, Number<"group_size", int> group_size) {
                 const WeightFormat weights = weight_format(format.c_str(), group_size);
                 const GilRelease release;  // it waits for a pass that is under way
                 return std::make_unique<HeldLinear>(std::in_place, n, k, weights);
               }),
           py::arg("n"), py::arg("k"), py::arg("format") = "bf16", py::arg("group_size") = 32)
      .def("load", &load, py::arg("w"))
      .def("load_blocks", &load_blocks, py::arg("w"))
      .def("unpack", &unpack, py::arg("out"), py::arg("dtype") = "bf16")
      .def("forward", &forward, py::arg("a"), py::arg("out"), py::arg("out_dtype") = "bf16", py::arg("rows") = "bf16",
           py::arg("bias") = py::none(), py::arg("kernel") = "")
      .def("input_grad", &input_grad, py::arg("dy"), py::arg("out"), py::arg("out_dtype") = "bf16",
           py::arg("kernel") = "")
      .def_property_readonly("packed_bytes", [](const HeldLinear& layer) { return layer->packed_bytes(); })
      .def_property_readonly("n", [](const HeldLinear& layer) { return layer->n(); })
      .def_property_readonly("k", [](const HeldLinear& layer) { return layer->k(); })
      .def_property_readonly("format", [](const HeldLinear& layer) { return format_name(layer->format()); })
      .def_property_readonly("group_size", [](const HeldLinear& layer) { return layer->format().group; });
}

}  // namespace kts
