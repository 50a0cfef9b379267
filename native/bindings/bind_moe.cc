// MoeLayer: converts and checks arguments, releases the GIL, calls.
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <variant>

#include "bindings.h"
#include "gil.h"
#include "kts/moe.h"
#include "rows_arg.h"
#include "tensor_arg.h"

namespace py = pybind11;

namespace kts {

namespace {

// One name, or those of gate, up and down.
using FormatArg = std::variant<std::string, std::array<std::string, 3>>;

ExpertFormats make_formats(const FormatArg& arg, int group_size) {
  if (const auto* name = std::get_if<std::string>(&arg)) return weight_format(name->c_str(), group_size);
  const auto& names = std::get<1>(arg);
  return {weight_format(names[0].c_str(), group_size), weight_format(names[1].c_str(), group_size),
          weight_format(names[2].c_str(), group_size)};
}

MoeShape make_shape(int64_t num_experts, int64_t hidden, int64_t inter, const FormatArg& format,
                    const std::string& activation, int group_size, const GateParams& params = {}) {
  MoeShape shape;
  shape.gate_params = params;
  shape.num_experts = num_experts, shape.hidden = hidden, shape.inter = inter;
  shape.format = make_formats(format, group_size);
  if (!activation_from_name(activation.c_str(), &shape.activation))
    throw py::value_error("activation: expected silu, gelu, gelu_tanh, relu or clamped_swiglu, got " + activation);
  if (num_experts <= 0 || hidden <= 0 || inter <= 0)
    throw py::value_error("MoeLayer: num_experts, hidden and inter must be positive");
  return shape;
}

// (a [experts, rank, in], b [experts, rank, out], scale) or None
struct LoraArg {
  std::optional<TensorArg> a, b;
  LoraView view;

  LoraArg(const py::object& value, const char* name, const MoeShape& shape, int64_t in, int64_t out) {
    if (value.is_none()) return;
    const auto parts = value.cast<py::tuple>();
    a.emplace(parts[0], name, "f32", 3, ".a");
    b.emplace(parts[1], name, "f32", 3, ".b");
    a->expect_shape({shape.num_experts, -1, in});
    b->expect_shape({shape.num_experts, a->size(1), out});
    view = {a->f32(),     a->stride(0), a->stride(1), b->f32(),
            b->stride(0), b->stride(1), a->size(1),   parts[2].cast<float>()};
  }
};

// (da [experts, rank, in] or None, db [experts, rank, out] or None) or None; in memory as FactorGrad says.
struct LoraGradArg {
  std::optional<TensorArg> a, b;
  LoraGradView view;

  LoraGradArg(const py::object& value, const char* name, const MoeShape& shape, int64_t rank, int64_t in, int64_t out) {
    if (value.is_none()) return;
    const auto parts = value.cast<py::tuple>();
    if (!parts[0].is_none()) view.a = factor(a.emplace(parts[0], name, "f32", 3, ".da", true), shape, rank, in);
    if (!parts[1].is_none()) view.b = factor(b.emplace(parts[1], name, "f32", 3, ".db", true), shape, rank, out);
  }

  static FactorGrad factor(const TensorArg& grad, const MoeShape& shape, int64_t rank, int64_t dim) {
    grad.expect_shape({shape.num_experts, rank, dim});
    if (dim == 1 || grad.stride(2) == 1) return {grad.f32(), grad.stride(0), grad.stride(1), 1};
    if ((shape.num_experts > 1 && grad.stride(0) != 1) || (rank > 1 && grad.stride(1) != shape.num_experts))
      grad.refuse("a last dimension of stride 1, or experts fastest and ranks next");
    return {grad.f32(), 1, shape.num_experts, grad.stride(2)};
  }
};

// (gate [experts, inter], up [experts, inter], down [experts, hidden]) or None
struct BiasArg {
  std::optional<TensorArg> gate, up, down;
  ExpertBias view;

  BiasArg(const py::object& value, const MoeShape& shape) {
    if (value.is_none()) return;
    const auto parts = value.cast<py::tuple>();
    view = {take(gate, parts[0], "gate bias", shape, shape.inter), take(up, parts[1], "up bias", shape, shape.inter),
            take(down, parts[2], "down bias", shape, shape.hidden)};
  }

  static const float* take(std::optional<TensorArg>& arg, const py::object& value, const char* name,
                           const MoeShape& shape, int64_t width) {
    arg.emplace(value, name, "f32", 2).expect_shape({shape.num_experts, width}).expect_contiguous();
    return arg->f32();
  }
};

struct CallArgs {
  TensorArg x, ids, weights;
  LoraArg gate, up, down;
  BiasArg bias;
  std::optional<TensorArg> g, u, xa_gate, xa_up;
  MoeInput input;
  ExpertLora lora;
  ForwardTape tape;

  CallArgs(const MoeShape& shape, const py::object& x_, const py::object& ids_, const py::object& weights_,
           const py::tuple& lora_, const py::object& g_, const py::object& u_, const py::object& xa_,
           const std::string& rows, const py::object& bias_)
      : x(x_, "x", "bf16", 2),
        ids(ids_, "topk_ids", "i64", 2),
        weights(weights_, "topk_weights", "f32", 2),
        gate(lora_[0], "lora gate", shape, shape.hidden, shape.inter),
        up(lora_[1], "lora up", shape, shape.hidden, shape.inter),
        down(lora_[2], "lora down", shape, shape.inter, shape.hidden),
        bias(bias_, shape) {
    const int64_t tokens = x.size(0);
    x.expect_shape({tokens, shape.hidden}).expect_contiguous();
    ids.expect_shape({tokens, -1}).expect_contiguous();
    weights.expect_shape({tokens, ids.size(1)}).expect_contiguous();
    input = {tokens, ids.size(1), x.bf16(), ids.i64(), weights.f32(), rows_from_name(rows), bias.view};
    lora = {gate.view, up.view, down.view};
    if (g_.is_none()) return;
    g.emplace(g_, "g", "f16", 2);
    u.emplace(u_, "u", "f16", 2);
    g->expect_shape({tokens * input.top_k, shape.inter_stride()}).expect_contiguous();
    u->expect_shape({tokens * input.top_k, shape.inter_stride()}).expect_contiguous();
    tape = {g->f16(), u->f16()};
    if (xa_.is_none()) return;
    const auto parts = xa_.cast<py::tuple>();
    tape.xa_gate = keep(xa_gate, parts[0], "xa gate", lora.gate);
    tape.xa_up = keep(xa_up, parts[1], "xa up", lora.up);
  }

  float* keep(std::optional<TensorArg>& xa, const py::object& value, const char* name, const LoraView& view) const {
    if (value.is_none()) return nullptr;
    xa.emplace(value, name, "f32", 2).expect_shape({input.tokens * input.top_k, view.rank}).expect_contiguous();
    return xa->f32();
  }
};

// A bf16 or f32 tensor [tokens, hidden] to be filled.
struct OutArg {
  std::optional<TensorArg> tensor;
  MoeOutput out;

  OutArg(const py::object& value, const char* name, const std::string& dtype, int64_t tokens, int64_t hidden) {
    if (value.is_none()) return;
    tensor.emplace(value, name, dtype.c_str(), 2);
    tensor->expect_shape({tokens, hidden}).expect_contiguous();
    (dtype == "bf16" ? static_cast<void>(out.bf16 = tensor->bf16()) : static_cast<void>(out.f32 = tensor->f32()));
  }
};

// bf16 [n, k], or uint8 [n, bytes of a row] where the format is f16 or a block type.
struct WeightArg {
  TensorArg tensor;
  bool is_bf16;

  WeightArg(const py::object& value, const char* name, WeightFormat format, int64_t n, int64_t k)
      : tensor(value, name, format.kind < Format::kF16 ? "bf16" : "u8", 2), is_bf16(format.kind < Format::kF16) {
    tensor.expect_shape({n, is_bf16 ? k : block_row_bytes(format, k)});
  }
  MoeLayer::WeightRows rows() const {
    if (is_bf16) return {tensor.bf16(), 2 * tensor.stride(0)};
    return {tensor.u8(), tensor.stride(0)};
  }
};

void load_expert(MoeLayer& layer, int64_t expert, const py::object& gate_, const py::object& up_,
                 const py::object& down_) {
  const MoeShape& s = layer.shape();
  const WeightArg gate(gate_, "gate", s.format.gate, s.inter, s.hidden), up(up_, "up", s.format.up, s.inter, s.hidden),
      down(down_, "down", s.format.down, s.hidden, s.inter);
  const GilRelease release;
  layer.load_expert(expert, gate.rows(), up.rows(), down.rows());
}

// (q u8 [n, k / 2], scales bf16 [n, groups])
struct StoredArg {
  TensorArg q, scales;
  StoredInt4 view;

  StoredArg(const py::tuple& parts, const char* name, int64_t n, int64_t k, int64_t group)
      : q(parts[0], name, "u8", 2, ".q"), scales(parts[1], name, "bf16", 2, ".scales") {
    q.expect_shape({n, k / 2});
    scales.expect_shape({n, ceil_div(k, group)});
    view = {q.u8(), q.stride(0), scales.bf16(), scales.stride(0)};
  }
};

void load_expert_int4(MoeLayer& layer, int64_t expert, const py::tuple& gate_, const py::tuple& up_,
                      const py::tuple& down_) {
  const MoeShape& s = layer.shape();
  const WeightFormat format = s.format.gate;
  KTS_CHECK(format.any_scale, "load_expert_int4: expected a layer of format rawint4");
  const StoredArg gate(gate_, "gate", s.inter, s.hidden, format.group);
  const StoredArg up(up_, "up", s.inter, s.hidden, format.group);
  const StoredArg down(down_, "down", s.hidden, s.inter, format.group);
  const GilRelease release;
  layer.load_expert_int4(expert, gate.view, up.view, down.view);
}

void unpack_expert(const MoeLayer& layer, int64_t expert, const py::object& gate_, const py::object& up_,
                   const py::object& down_, const std::string& dtype) {
  const MoeShape& s = layer.shape();
  const TensorArg gate(gate_, "gate", dtype.c_str(), 2), up(up_, "up", dtype.c_str(), 2),
      down(down_, "down", dtype.c_str(), 2);
  gate.expect_shape({s.inter, s.hidden});
  up.expect_shape({s.inter, s.hidden});
  down.expect_shape({s.hidden, s.inter});
  const GilRelease release;
  if (dtype == "bf16") {
    layer.unpack_expert(expert, gate.bf16(), gate.stride(0), up.bf16(), up.stride(0), down.bf16(), down.stride(0));
  } else {
    layer.unpack_expert(expert, gate.f32(), gate.stride(0), up.f32(), up.stride(0), down.f32(), down.stride(0));
  }
}

// The bytes of a blob; the buffer must be writable where T is not const.
template <class T>
T* blob(const py::buffer_info& buffer, const char* name, int64_t bytes) {
  const bool is_flat = buffer.ndim == 1 && buffer.itemsize == 1 && buffer.strides[0] == 1;
  if (!is_flat || buffer.size != bytes)
    throw py::value_error(std::string(name) + ": expected " + std::to_string(bytes) + " contiguous bytes, got " +
                          std::to_string(buffer.size * buffer.itemsize) + (is_flat ? "" : " of another layout"));
  return static_cast<T*>(buffer.ptr);
}

void load_packed(MoeLayer& layer, int64_t expert, const py::buffer& gate_, const py::buffer& up_,
                 const py::buffer& down_, bool copy) {
  const py::buffer_info gate = gate_.request(), up = up_.request(), down = down_.request();
  const ExpertBlobs<const char> blobs{blob<const char>(gate, "gate", layer.gate_blob_bytes()),
                                      blob<const char>(up, "up", layer.up_blob_bytes()),
                                      blob<const char>(down, "down", layer.down_blob_bytes())};
  const GilRelease release;
  copy ? layer.copy_expert(expert, blobs) : layer.map_expert(expert, blobs);
}

void export_packed(const MoeLayer& layer, int64_t expert, const py::buffer& gate_, const py::buffer& up_,
                   const py::buffer& down_) {
  const py::buffer_info gate = gate_.request(true), up = up_.request(true), down = down_.request(true);
  const ExpertBlobs<char> blobs{blob<char>(gate, "gate", layer.gate_blob_bytes()),
                                blob<char>(up, "up", layer.up_blob_bytes()),
                                blob<char>(down, "down", layer.down_blob_bytes())};
  const GilRelease release;
  layer.export_expert(expert, blobs);
}

void forward(const MoeLayer& layer, const py::object& x, const py::object& ids, const py::object& weights,
             const py::tuple& lora, const py::object& g, const py::object& u, const py::object& out_,
             const std::string& out_dtype, float dropout_p, uint64_t dropout_seed, int64_t chunk,
             const std::string& rows, const py::object& xa, const py::object& bias) {
  const CallArgs args(layer.shape(), x, ids, weights, lora, g, u, xa, rows, bias);
  const OutArg out(out_, "out", out_dtype, args.input.tokens, layer.shape().hidden);
  const GilRelease release;
  layer.forward(args.input, args.lora, {dropout_p, dropout_seed}, chunk, args.tape, out.out);
}

void backward(const MoeLayer& layer, const py::object& dout_, const py::object& x, const py::object& ids,
              const py::object& weights, const py::tuple& lora, const py::object& g, const py::object& u,
              const py::object& dx_, const std::string& dx_dtype, const py::object& dweights_,
              const py::tuple& lora_grads, float dropout_p, uint64_t dropout_seed, int64_t chunk,
              const std::string& rows, const py::object& xa, const py::object& bias) {
  const MoeShape& s = layer.shape();
  const CallArgs args(s, x, ids, weights, lora, g, u, xa, rows, bias);
  const TensorArg dout(dout_, "dout", "bf16", 2);
  dout.expect_shape({args.input.tokens, s.hidden}).expect_contiguous();
  const OutArg dx(dx_, "dx", dx_dtype, args.input.tokens, s.hidden);
  const LoraGradArg gate(lora_grads[0], "lora gate", s, args.lora.gate.rank, s.hidden, s.inter);
  const LoraGradArg up(lora_grads[1], "lora up", s, args.lora.up.rank, s.hidden, s.inter);
  const LoraGradArg down(lora_grads[2], "lora down", s, args.lora.down.rank, s.inter, s.hidden);
  MoeGrads grads{dx.out, nullptr, {gate.view, up.view, down.view}};
  std::optional<TensorArg> dweights;
  if (!dweights_.is_none()) {
    dweights.emplace(dweights_, "dtopk_weights", "f32", 2);
    dweights->expect_shape({args.input.tokens, args.input.top_k}).expect_contiguous();
    grads.dtopk_weights = dweights->f32();
  }
  const GilRelease release;
  layer.backward(args.input, dout.bf16(), args.lora, {dropout_p, dropout_seed}, chunk, args.tape, grads);
}

}  // namespace

void bind_moe(py::module_& m) {
  // int8 rows are the faster ones where the CPU multiplies bytes, block floating point elsewhere.
  m.def("default_rows", [](const std::string& format) {
    const Format kind = weight_format(format.c_str(), 32).kind;
    if (!takes_rows(kind, Rows::kBfp16)) return "bf16";
    const bool has_dot = takes_rows(kind, Rows::kInt8) && (active_isa() & (kAvx512Vnni | kAmxInt8)) != 0;
    return has_dot ? "int8" : (active_isa() & (kAvx2 | kAvx512)) != 0 ? "bfp16" : "bf16";
  });
  py::class_<MoeLayer>(m, "MoeLayer")
      .def(py::init([](int64_t num_experts, int64_t hidden, int64_t inter, const FormatArg& format,
                       const std::string& activation, int group_size, float alpha, float limit) {
             return std::make_unique<MoeLayer>(
                 make_shape(num_experts, hidden, inter, format, activation, group_size, {alpha, limit}));
           }),
           py::arg("num_experts"), py::arg("hidden"), py::arg("inter"), py::arg("format") = "bf16",
           py::arg("activation") = "silu", py::arg("group_size") = 32, py::arg("alpha") = GateParams{}.alpha,
           py::arg("limit") = GateParams{}.limit, "alpha and limit: of clamped_swiglu")
      .def("load_expert", &load_expert, py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"))
      .def("load_expert_int4", &load_expert_int4, py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"))
      .def("unpack_expert", &unpack_expert, py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"),
           py::arg("dtype") = "bf16")
      // Two functions, since only memory that is used in place has to outlive the call.
      .def(
          "map_expert",
          [](MoeLayer& layer, int64_t expert, const py::buffer& gate, const py::buffer& up, const py::buffer& down) {
            load_packed(layer, expert, gate, up, down, false);
          },
          py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"), py::keep_alive<1, 3>(),
          py::keep_alive<1, 4>(), py::keep_alive<1, 5>())
      .def(
          "copy_expert",
          [](MoeLayer& layer, int64_t expert, const py::buffer& gate, const py::buffer& up, const py::buffer& down) {
            load_packed(layer, expert, gate, up, down, true);
          },
          py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"))
      .def("export_expert", &export_packed, py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"))
      .def("forward", &forward, py::arg("x"), py::arg("topk_ids"), py::arg("topk_weights"), py::kw_only(),
           py::arg("lora"), py::arg("g"), py::arg("u"), py::arg("out"), py::arg("out_dtype"), py::arg("dropout_p"),
           py::arg("dropout_seed"), py::arg("chunk_size"), py::arg("rows") = "bf16", py::arg("xa") = py::none(),
           py::arg("bias") = py::none())
      .def("backward", &backward, py::arg("dout"), py::arg("x"), py::arg("topk_ids"), py::arg("topk_weights"),
           py::kw_only(), py::arg("lora"), py::arg("g"), py::arg("u"), py::arg("dx"), py::arg("dx_dtype"),
           py::arg("dtopk_weights"), py::arg("lora_grads"), py::arg("dropout_p"), py::arg("dropout_seed"),
           py::arg("chunk_size"), py::arg("rows") = "bf16", py::arg("xa") = py::none(), py::arg("bias") = py::none())
      .def_property_readonly("packed_bytes", &MoeLayer::packed_bytes)
      .def_property_readonly("missing_experts", &MoeLayer::missing_experts)
      .def_property_readonly("mapped_experts", &MoeLayer::mapped_experts)
      .def_property_readonly("blob_bytes",
                             [](const MoeLayer& layer) {
                               return std::make_tuple(layer.gate_blob_bytes(), layer.up_blob_bytes(),
                                                      layer.down_blob_bytes());
                             })
      .def_property_readonly("format",
                             [](const MoeLayer& layer) {
                               const ExpertFormats& all = layer.shape().format;
                               return std::string(all.is_uniform() ? format_name(all.gate) : "mixed");
                             })
      .def_property_readonly("formats",
                             [](const MoeLayer& layer) {
                               const ExpertFormats& all = layer.shape().format;
                               return py::make_tuple(format_name(all.gate), format_name(all.up), format_name(all.down));
                             })
      .def_property_readonly("group_size", [](const MoeLayer& layer) { return layer.shape().format.gate.group; })
      .def_property_readonly("num_shards", &MoeLayer::num_shards)
      .def_property_readonly("num_experts", [](const MoeLayer& layer) { return layer.shape().num_experts; })
      .def_property_readonly("hidden", [](const MoeLayer& layer) { return layer.shape().hidden; })
      .def_property_readonly("inter", [](const MoeLayer& layer) { return layer.shape().inter; })
      .def_property_readonly("inter_stride", [](const MoeLayer& layer) { return layer.shape().inter_stride(); })
      .def_static(
          "packed_bytes_for",
          [](int64_t num_experts, int64_t hidden, int64_t inter, const FormatArg& format, int group_size) {
            return MoeLayer::packed_bytes_for(make_shape(num_experts, hidden, inter, format, "silu", group_size));
          },
          py::arg("num_experts"), py::arg("hidden"), py::arg("inter"), py::arg("format") = "bf16",
          py::arg("group_size") = 32);
}

}  // namespace kts
