// MoeLayer: converts and checks arguments, releases the GIL, calls.
#include "kts/moe.h"

#include <cmath>
#include <memory>
#include <optional>
#include <string>

#include "bindings.h"
#include "gil.h"
#include "held.h"
#include "held_store.h"
#include "moe_args.h"
#include "name_arg.h"
#include "plain_arg.h"
#include "tensor_arg.h"

namespace py = pybind11;

namespace kts {

namespace {

// A layer and the Python object of its store, which lives as long.
struct StoredLayer {
  py::object store;
  MoeLayer layer;

  StoredLayer(py::object store_, const Glu& glu) : store(std::move(store_)), layer(*store.cast<HeldStore&>(), glu) {}
};
using HeldLayer = Held<StoredLayer>;

Glu make_glu(const std::string& activation, const GateParams& params) {
  Glu glu{Activation::kSilu, params};
  if (!activation_from_name(activation.c_str(), &glu.activation))
    throw py::value_error("activation: expected silu, gelu, gelu_tanh, relu or clamped_swiglu, got " + activation);
  if (!std::isfinite(params.alpha)) throw py::value_error("alpha: expected a finite number");
  if (!std::isfinite(params.limit) || params.limit <= 0.0f)
    throw py::value_error("limit: expected a finite number above zero");
  return glu;
}

// A result [tokens, hidden].
TensorOut result_arg(CallMemory& call, const py::object& value, const char* name, DType dtype, const CallArgs& args) {
  return {call, value, name, dtype, {args.x.size(0), args.x.size(1)}, Layout::kContiguous};
}

void forward(const HeldLayer& held, const py::object& x, const py::object& ids, const py::object& weights,
             const py::object& lora, const py::object& g, const py::object& u, const py::object& out_,
             const Text<"out_dtype">& out_dtype, Number<"dropout_p", float> dropout_p,
             Number<"dropout_seed", uint64_t> dropout_seed, Number<"chunk_size"> chunk, const Text<"rows">& rows,
             const py::object& xa, const py::object& bias) {
  const ExpertShape& s = held->layer.shape();
  CallMemory call;
  const CallArgs args(call, s, x, ids, weights, lora, rows, bias);
  const TapeArg<TensorOut> tape(call, g, u, xa, s, args.lora, args.input.tokens * args.input.top_k);
  const TensorOut out = result_arg(call, out_, "out", result_dtype("out_dtype", out_dtype), args);
  const GilRelease release;
  held->layer.forward(args.input, args.lora, {dropout_p, dropout_seed}, chunk, tape.view, out.as_output<MoeOutput>());
}

void backward(const HeldLayer& held, const py::object& dout_, const py::object& x, const py::object& ids,
              const py::object& weights, const py::object& lora, const py::object& g, const py::object& u,
              const py::object& dx_, const Text<"dx_dtype">& dx_dtype, const py::object& dweights_,
              const py::object& lora_grads, Number<"dropout_p", float> dropout_p,
              Number<"dropout_seed", uint64_t> dropout_seed, Number<"chunk_size"> chunk, const Text<"rows">& rows,
              const py::object& xa, const py::object& bias) {
  const ExpertShape& s = held->layer.shape();
  CallMemory call;
  const CallArgs args(call, s, x, ids, weights, lora, rows, bias);
  const int64_t tokens = args.input.tokens, top_k = args.input.top_k;
  const TapeArg<TensorIn> tape(call, g, u, xa, s, args.lora, tokens * top_k);
  const TensorIn dout(call, dout_, "dout", kBf16, {tokens, s.hidden}, Layout::kContiguous);
  const DType dtype = result_dtype("dx_dtype", dx_dtype);
  MoeGrads grads;
  std::optional<TensorOut> dx, dweights;
  if (!dx_.is_none()) grads.dx = dx.emplace(result_arg(call, dx_, "dx", dtype, args)).as_output<MoeOutput>();
  const py::tuple parts = items_of(lora_grads, "lora_grads", 3, "those of gate, up and down");
  const LoraGradArg gate(call, parts[0], "lora gate", s, args.lora.gate, s.hidden, s.inter);
  const LoraGradArg up(call, parts[1], "lora up", s, args.lora.up, s.hidden, s.inter);
  const LoraGradArg down(call, parts[2], "lora down", s, args.lora.down, s.inter, s.hidden);
  grads.lora = {gate.view, up.view, down.view};
  if (!dweights_.is_none()) {
    dweights.emplace(call, dweights_, "dtopk_weights", kF32, Shape{tokens, top_k}, Layout::kContiguous);
    grads.dtopk_weights = dweights->f32();
  }
  const GilRelease release;
  held->layer.backward(args.input, dout.bf16(), args.lora, {dropout_p, dropout_seed}, chunk, tape.view, grads);
}

}  // namespace

void bind_moe(py::module_& m) {
  py::class_<HeldLayer>(m, "MoeLayer")
      .def(py::init([](const py::object& store, const Text<"activation">& activation, Number<"alpha", float> alpha,
                       Number<"limit", float> limit) {
             if (!py::isinstance<HeldStore>(store)) refuse_value("store", "an ExpertStore", store);
             return std::make_unique<HeldLayer>(std::in_place, store, make_glu(activation, {alpha, limit}));
           }),
           py::arg("store"), py::arg("activation") = "silu", py::arg("alpha") = GateParams{}.alpha,
           py::arg("limit") = GateParams{}.limit, "alpha and limit: of clamped_swiglu")
      .def("forward", &forward, py::arg("x"), py::arg("topk_ids"), py::arg("topk_weights"), py::kw_only(),
           py::arg("lora"), py::arg("g"), py::arg("u"), py::arg("out"), py::arg("out_dtype"), py::arg("dropout_p"),
           py::arg("dropout_seed"), py::arg("chunk_size"), py::arg("rows") = "bf16", py::arg("xa") = py::none(),
           py::arg("bias") = py::none())
      .def("backward", &backward, py::arg("dout"), py::arg("x"), py::arg("topk_ids"), py::arg("topk_weights"),
           py::kw_only(), py::arg("lora"), py::arg("g"), py::arg("u"), py::arg("dx"), py::arg("dx_dtype"),
           py::arg("dtopk_weights"), py::arg("lora_grads"), py::arg("dropout_p"), py::arg("dropout_seed"),
           py::arg("chunk_size"), py::arg("rows") = "bf16", py::arg("xa") = py::none(), py::arg("bias") = py::none())
      .def_property_readonly("store", [](const HeldLayer& held) { return held->store; })
      .def_property_readonly("num_experts", [](const HeldLayer& held) { return held->layer.shape().num_experts; })
      .def_property_readonly("hidden", [](const HeldLayer& held) { return held->layer.shape().hidden; })
      .def_property_readonly("inter", [](const HeldLayer& held) { return held->layer.shape().inter; })
      .def_property_readonly("inter_stride", [](const HeldLayer& held) { return held->layer.shape().inter_stride(); });
}

}  // namespace kts
