// MoeLayer: converts and checks arguments, releases the GIL, calls.
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>

#include "bindings.h"
#include "blob_arg.h"
#include "gil.h"
#include "held.h"
#include "kts/moe.h"
#include "moe_args.h"
#include "name_arg.h"
#include "plain_arg.h"
#include "tensor_arg.h"

namespace py = pybind11;

namespace kts {

namespace {

using HeldMoe = Held<MoeLayer>;

// One name, or those of gate, up and down.
ExpertFormats make_formats(const py::object& names, int group_size) {
  const auto format = [&](const py::handle& name) {
    return weight_format(to_text(name, "format").c_str(), group_size);
  };
  if (py::isinstance<py::str>(names)) return format(names);
  const bool is_sequence = py::isinstance<py::tuple>(names) || py::isinstance<py::list>(names);
  if (!is_sequence || py::len(names) != 3) refuse_value("format", "a name or those of gate, up and down", names);
  const py::tuple three(names);
  return {format(three[0]), format(three[1]), format(three[2])};
}

MoeShape make_shape(int64_t num_experts, int64_t hidden, int64_t inter, const py::object& format,
                    const std::string& activation, int group_size, const GateParams& params = {}) {
  MoeShape shape;
  shape.gate_params = params;
  shape.num_experts = num_experts, shape.hidden = hidden, shape.inter = inter;
  shape.format = make_formats(format, group_size);
  if (!activation_from_name(activation.c_str(), &shape.activation))
    throw py::value_error("activation: expected silu, gelu, gelu_tanh, relu or clamped_swiglu, got " + activation);
  if (!std::isfinite(params.alpha)) throw py::value_error("alpha: expected a finite number");
  if (!std::isfinite(params.limit) || params.limit <= 0.0f)
    throw py::value_error("limit: expected a finite number above zero");
  check_shape(shape);
  return shape;
}

// A result [tokens, hidden].
TensorOut result_arg(CallMemory& call, const py::object& value, const char* name, DType dtype, const CallArgs& args) {
  return {call, value, name, dtype, {args.x.size(0), args.x.size(1)}, Layout::kContiguous};
}

// bf16 [n, k], or uint8 [n, bytes of a row] where the format is f16 or a block type.
struct WeightArg {
  TensorIn tensor;

  WeightArg(CallMemory& call, const py::object& value, const char* name, WeightFormat format, int64_t n, int64_t k)
      : tensor(call, value, name, format.kind < Format::kF16 ? kBf16 : kU8,
               {n, format.kind < Format::kF16 ? k : block_row_bytes(format, k)}, Layout::kRows) {}
  MoeLayer::WeightRows rows() const {
    if (tensor.dtype() == kBf16) return {tensor.bf16(), 2 * tensor.stride(0)};
    return {tensor.u8(), tensor.stride(0)};
  }
};

void load_expert(const HeldMoe& layer, Number<"expert"> expert, const py::object& gate_, const py::object& up_,
                 const py::object& down_) {
  const MoeShape& s = layer->shape();
  CallMemory call;
  const WeightArg gate(call, gate_, "gate", s.format.gate, s.inter, s.hidden);
  const WeightArg up(call, up_, "up", s.format.up, s.inter, s.hidden);
  const WeightArg down(call, down_, "down", s.format.down, s.hidden, s.inter);
  const GilRelease release;
  layer->load_expert(expert, gate.rows(), up.rows(), down.rows());
}

// (q u8 [n, k / 2], scales bf16 [n, groups])
struct StoredArg {
  py::tuple parts;
  TensorIn q, scales;

  StoredArg(CallMemory& call, const py::object& value, const char* name, int64_t n, int64_t k, int64_t group)
      : parts(items_of(value, name, 2, "(q, scales)")),
        q(call, parts[0], {name, ".q"}, kU8, {n, k / 2}, Layout::kRows),
        scales(call, parts[1], {name, ".scales"}, kBf16, {n, ceil_div(k, group)}, Layout::kRows) {}
  StoredInt4 view() const { return {q.u8(), q.stride(0), scales.bf16(), scales.stride(0)}; }
};

void load_expert_int4(const HeldMoe& layer, Number<"expert"> expert, const py::object& gate_, const py::object& up_,
                      const py::object& down_) {
  const MoeShape& s = layer->shape();
  const WeightFormat format = s.format.gate;
  KTS_CHECK(format.any_scale, "load_expert_int4: expected a layer of format rawint4");
  CallMemory call;
  const StoredArg gate(call, gate_, "gate", s.inter, s.hidden, format.group);
  const StoredArg up(call, up_, "up", s.inter, s.hidden, format.group);
  const StoredArg down(call, down_, "down", s.hidden, s.inter, format.group);
  const GilRelease release;
  layer->load_expert_int4(expert, gate.view(), up.view(), down.view());
}

void unpack_expert(const HeldMoe& layer, Number<"expert"> expert, const py::object& gate_, const py::object& up_,
                   const py::object& down_, const Text<"dtype">& dtype_) {
  const MoeShape& s = layer->shape();
  const DType dtype = result_dtype("dtype", dtype_);
  CallMemory call;
  const TensorOut gate(call, gate_, "gate", dtype, {s.inter, s.hidden}, Layout::kRows);
  const TensorOut up(call, up_, "up", dtype, {s.inter, s.hidden}, Layout::kRows);
  const TensorOut down(call, down_, "down", dtype, {s.hidden, s.inter}, Layout::kRows);
  const GilRelease release;
  if (dtype == kBf16) {
    layer->unpack_expert(expert, gate.bf16(), gate.stride(0), up.bf16(), up.stride(0), down.bf16(), down.stride(0));
  } else {
    layer->unpack_expert(expert, gate.f32(), gate.stride(0), up.f32(), up.stride(0), down.f32(), down.stride(0));
  }
}

// The blobs of one expert.
struct BlobArgs {
  CallMemory call;
  BlobArg gate, up, down;

  BlobArgs(const MoeLayer& layer, const py::object& gate_, const py::object& up_, const py::object& down_,
           Access access)
      : gate(call, gate_, "gate", layer.gate_blob_bytes(), access),
        up(call, up_, "up", layer.up_blob_bytes(), access),
        down(call, down_, "down", layer.down_blob_bytes(), access) {}
  ExpertBlobs<const char> read() const { return {gate.data(), up.data(), down.data()}; }
};

void map_expert(const HeldMoe& layer, Number<"expert"> expert, const py::object& gate, const py::object& up,
                const py::object& down) {
  BlobArgs blobs(*layer, gate, up, down, Access::kRead);
  const ExpertBlobs<const char> views = blobs.read();
  auto owner = BlobArg::keep(std::move(blobs.gate), std::move(blobs.up), std::move(blobs.down));
  const GilRelease release;
  layer->map_expert(expert, views, std::move(owner));
}

void copy_expert(const HeldMoe& layer, Number<"expert"> expert, const py::object& gate, const py::object& up,
                 const py::object& down) {
  const BlobArgs blobs(*layer, gate, up, down, Access::kRead);
  const GilRelease release;
  layer->copy_expert(expert, blobs.read());
}

void export_expert(const HeldMoe& layer, Number<"expert"> expert, const py::object& gate, const py::object& up,
                   const py::object& down) {
  const BlobArgs blobs(*layer, gate, up, down, Access::kWrite);
  const GilRelease release;
  layer->export_expert(expert, {blobs.gate.writable(), blobs.up.writable(), blobs.down.writable()});
}

void forward(const HeldMoe& layer, const py::object& x, const py::object& ids, const py::object& weights,
             const py::object& lora, const py::object& g, const py::object& u, const py::object& out_,
             const Text<"out_dtype">& out_dtype, Number<"dropout_p", float> dropout_p,
             Number<"dropout_seed", uint64_t> dropout_seed, Number<"chunk_size"> chunk, const Text<"rows">& rows,
             const py::object& xa, const py::object& bias) {
  const MoeShape& s = layer->shape();
  CallMemory call;
  const CallArgs args(call, s, x, ids, weights, lora, rows, bias);
  const TapeArg<TensorOut> tape(call, g, u, xa, s, args.lora, args.input.tokens * args.input.top_k);
  const TensorOut out = result_arg(call, out_, "out", result_dtype("out_dtype", out_dtype), args);
  const GilRelease release;
  layer->forward(args.input, args.lora, {dropout_p, dropout_seed}, chunk, tape.view, out.as_output<MoeOutput>());
}

void backward(const HeldMoe& layer, const py::object& dout_, const py::object& x, const py::object& ids,
              const py::object& weights, const py::object& lora, const py::object& g, const py::object& u,
              const py::object& dx_, const Text<"dx_dtype">& dx_dtype, const py::object& dweights_,
              const py::object& lora_grads, Number<"dropout_p", float> dropout_p,
              Number<"dropout_seed", uint64_t> dropout_seed, Number<"chunk_size"> chunk, const Text<"rows">& rows,
              const py::object& xa, const py::object& bias) {
  const MoeShape& s = layer->shape();
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
  layer->backward(args.input, dout.bf16(), args.lora, {dropout_p, dropout_seed}, chunk, tape.view, grads);
}

// Experts of one kind: waits for a call that changes them.
template <int64_t (MoeLayer::*kCount)() const>
int64_t count_experts(const HeldMoe& layer) {
  const MoeLayer& counted = *layer;
  const GilRelease release;
  return (counted.*kCount)();
}

void bind_facts(py::class_<HeldMoe>& layer) {
  const auto shape_of = [](const HeldMoe& held) -> const MoeShape& { return held->shape(); };
  layer.def_property_readonly("packed_bytes", [](const HeldMoe& held) { return held->packed_bytes(); })
      .def_property_readonly("missing_experts", &count_experts<&MoeLayer::missing_experts>)
      .def_property_readonly("mapped_experts", &count_experts<&MoeLayer::mapped_experts>)
      .def_property_readonly("blob_bytes",
                             [](const HeldMoe& held) {
                               return std::make_tuple(held->gate_blob_bytes(), held->up_blob_bytes(),
                                                      held->down_blob_bytes());
                             })
      .def_property_readonly("format",
                             [=](const HeldMoe& held) {
                               const ExpertFormats& all = shape_of(held).format;
                               return std::string(all.is_uniform() ? format_name(all.gate) : "mixed");
                             })
      .def_property_readonly("formats",
                             [=](const HeldMoe& held) {
                               const ExpertFormats& all = shape_of(held).format;
                               return py::make_tuple(format_name(all.gate), format_name(all.up), format_name(all.down));
                             })
      .def_property_readonly("group_size", [=](const HeldMoe& held) { return shape_of(held).format.gate.group; })
      .def_property_readonly("num_shards", [](const HeldMoe& held) { return held->num_shards(); })
      .def_property_readonly("num_experts", [=](const HeldMoe& held) { return shape_of(held).num_experts; })
      .def_property_readonly("hidden", [=](const HeldMoe& held) { return shape_of(held).hidden; })
      .def_property_readonly("inter", [=](const HeldMoe& held) { return shape_of(held).inter; })
      .def_property_readonly("inter_stride", [=](const HeldMoe& held) { return shape_of(held).inter_stride(); });
}

}  // namespace

void bind_moe(py::module_& m) {
  py::class_<HeldMoe> layer(m, "MoeLayer");
  layer
      .def(py::init([](Number<"num_experts"> num_experts, Number<"hidden"> hidden, Number<"inter"> inter,
                       const py::object& format, const Text<"activation">& activation,
                       Number<"group_size", int> group_size, Number<"alpha", float> alpha,
                       Number<"limit", float> limit) {
             return std::make_unique<HeldMoe>(
                 std::in_place, make_shape(num_experts, hidden, inter, format, activation, group_size, {alpha, limit}));
           }),
           py::arg("num_experts"), py::arg("hidden"), py::arg("inter"), py::arg("format") = "bf16",
           py::arg("activation") = "silu", py::arg("group_size") = 32, py::arg("alpha") = GateParams{}.alpha,
           py::arg("limit") = GateParams{}.limit, "alpha and limit: of clamped_swiglu")
      .def("load_expert", &load_expert, py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"))
      .def("load_expert_int4", &load_expert_int4, py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"))
      .def("unpack_expert", &unpack_expert, py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"),
           py::arg("dtype") = "bf16")
      .def("map_expert", &map_expert, py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"),
           "Memory that is used in place is held until the expert gets other weights.")
      .def("copy_expert", &copy_expert, py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"))
      .def("export_expert", &export_expert, py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"))
      .def("forward", &forward, py::arg("x"), py::arg("topk_ids"), py::arg("topk_weights"), py::kw_only(),
           py::arg("lora"), py::arg("g"), py::arg("u"), py::arg("out"), py::arg("out_dtype"), py::arg("dropout_p"),
           py::arg("dropout_seed"), py::arg("chunk_size"), py::arg("rows") = "bf16", py::arg("xa") = py::none(),
           py::arg("bias") = py::none())
      .def("backward", &backward, py::arg("dout"), py::arg("x"), py::arg("topk_ids"), py::arg("topk_weights"),
           py::kw_only(), py::arg("lora"), py::arg("g"), py::arg("u"), py::arg("dx"), py::arg("dx_dtype"),
           py::arg("dtopk_weights"), py::arg("lora_grads"), py::arg("dropout_p"), py::arg("dropout_seed"),
           py::arg("chunk_size"), py::arg("rows") = "bf16", py::arg("xa") = py::none(), py::arg("bias") = py::none())
      .def_static(
          "packed_bytes_for",
          [](Number<"num_experts"> num_experts, Number<"hidden"> hidden, Number<"inter"> inter,
             const py::object& format, Number<"group_size", int> group_size) {
            return MoeLayer::packed_bytes_for(make_shape(num_experts, hidden, inter, format, "silu", group_size));
          },
          py::arg("num_experts"), py::arg("hidden"), py::arg("inter"), py::arg("format") = "bf16",
          py::arg("group_size") = 32);
  bind_facts(layer);
}

}  // namespace kts
