// PackedLinear: converts and checks arguments, releases the GIL, calls.
#include "kts/linear.h"

#include <memory>
#include <optional>
#include <string>

#include "bindings.h"
#include "gil.h"
#include "rows_arg.h"
#include "tensor_arg.h"

namespace py = pybind11;

namespace kts {

namespace {

LinearOutput output_of(const TensorArg& out, const std::string& dtype) {
  if (dtype == "bf16") return {out.bf16(), nullptr, out.stride(0)};
  return {nullptr, out.f32(), out.stride(0)};
}

const std::string& float_name(const std::string& dtype) {
  if (dtype != "bf16" && dtype != "f32") throw py::value_error("dtype: expected bf16 or f32, got " + dtype);
  return dtype;
}

void load(PackedLinear& layer, const py::object& w_) {
  const TensorArg w(w_, "w", "bf16", 2);
  w.expect_shape({layer.n(), layer.k()});
  const GilRelease release;
  layer.load(w.bf16(), w.stride(0));
}

void load_blocks(PackedLinear& layer, const py::object& w_) {
  const TensorArg w(w_, "w", "u8", 2);
  w.expect_shape({layer.n(), block_row_bytes(layer.format(), layer.k())});
  const GilRelease release;
  layer.load_blocks(w.u8(), w.stride(0));
}

void unpack(const PackedLinear& layer, const py::object& out_, const std::string& dtype) {
  const TensorArg out(out_, "out", float_name(dtype).c_str(), 2);
  out.expect_shape({layer.n(), layer.k()}).expect_contiguous();
  const GilRelease release;
  dtype == "bf16" ? layer.unpack(out.bf16(), out.stride(0)) : layer.unpack(out.f32(), out.stride(0));
}

void forward(const PackedLinear& layer, const py::object& a_, const py::object& out_, const std::string& out_dtype,
             const std::string& rows, const py::object& bias_, const std::string& kernel) {
  const TensorArg a(a_, "a", "bf16", 2), out(out_, "out", float_name(out_dtype).c_str(), 2);
  a.expect_shape({-1, layer.k()});
  out.expect_shape({a.size(0), layer.n()}).expect_contiguous();
  std::optional<TensorArg> bias;
  if (!bias_.is_none()) bias.emplace(bias_, "bias", "f32", 1).expect_shape({layer.n()});
  const Rows kind = rows_from_name(rows);
  if (!takes_rows(layer.format().kind, kind))
    throw py::value_error("rows: " + rows + " needs int8 or int4 weights, this layer has " +
                          format_name(layer.format()) + " weights");
  const GilRelease release;
  layer.forward(a.bf16(), a.stride(0), a.size(0), kind, bias ? bias->f32() : nullptr, kernel.c_str(),
                output_of(out, out_dtype));
}

void input_grad(const PackedLinear& layer, const py::object& dy_, const py::object& out_, const std::string& out_dtype,
                const std::string& kernel) {
  const TensorArg dy(dy_, "dy", "bf16", 2), out(out_, "out", float_name(out_dtype).c_str(), 2);
  dy.expect_shape({-1, layer.n()});
  out.expect_shape({dy.size(0), layer.k()}).expect_contiguous();
  const GilRelease release;
  layer.input_grad(dy.bf16(), dy.stride(0), dy.size(0), kernel.c_str(), output_of(out, out_dtype));
}

}  // namespace

void bind_linear(py::module_& m) {
  py::class_<PackedLinear>(m, "PackedLinear")
      .def(py::init([](int64_t n, int64_t k, const std::string& format, int group_size) {
             return std::make_unique<PackedLinear>(n, k, weight_format(format.c_str(), group_size));
           }),
           py::arg("n"), py::arg("k"), py::arg("format") = "bf16", py::arg("group_size") = 32)
      .def("load", &load, py::arg("w"))
      .def("load_blocks", &load_blocks, py::arg("w"))
      .def("unpack", &unpack, py::arg("out"), py::arg("dtype") = "bf16")
      .def("forward", &forward, py::arg("a"), py::arg("out"), py::arg("out_dtype") = "bf16", py::arg("rows") = "bf16",
           py::arg("bias") = py::none(), py::arg("kernel") = "")
      .def("input_grad", &input_grad, py::arg("dy"), py::arg("out"), py::arg("out_dtype") = "bf16",
           py::arg("kernel") = "")
      .def_property_readonly("packed_bytes", &PackedLinear::packed_bytes)
      .def_property_readonly("n", &PackedLinear::n)
      .def_property_readonly("k", &PackedLinear::k)
      .def_property_readonly("format", [](const PackedLinear& layer) { return format_name(layer.format()); })
      .def_property_readonly("group_size", [](const PackedLinear& layer) { return layer.format().group; });
}

}  // namespace kts
