// What the functions of MoeLayer take beside plain tensors: LoRA, its gradients, biases, the tape.
#pragma once
#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "kts/moe.h"
#include "name_arg.h"
#include "plain_arg.h"
#include "tensor_arg.h"

namespace kts {

// (a [experts, rank, in], b [experts, rank, out], scale) or None
struct LoraArg {
  std::optional<TensorIn> a, b;
  LoraView view;

  LoraArg(CallMemory& call, const pybind11::object& value, const char* name, const ExpertShape& shape, int64_t in,
          int64_t out) {
    if (value.is_none()) return;
    const pybind11::tuple parts = items_of(value, name, 3, "(a, b, scale) or None");
    a.emplace(call, parts[0], ArgName(name, ".a"), kF32, Shape{shape.num_experts, kAnySize, in}, Layout::kRows);
    b.emplace(call, parts[1], ArgName(name, ".b"), kF32, Shape{shape.num_experts, a->size(1), out}, Layout::kRows);
    view = {a->f32(),     a->stride(0), a->stride(1), b->f32(),
            b->stride(0), b->stride(1), a->size(1),   to_float(parts[2], name)};
  }
};

// (da [experts, rank, in] or None, db [experts, rank, out] or None) or None; in memory as FactorGrad says.
struct LoraGradArg {
  std::optional<TensorOut> a, b;
  LoraGradView view;

  LoraGradArg(CallMemory& call, const pybind11::object& value, const char* name, const ExpertShape& shape,
              const LoraView& lora, int64_t in, int64_t out) {
    if (value.is_none()) return;
    const pybind11::tuple parts = items_of(value, name, 2, "(da, db) or None");
    if (!parts[0].is_none()) view.a = take(call, a, parts[0], {name, ".da"}, shape, lora.rank, in);
    if (!parts[1].is_none()) view.b = take(call, b, parts[1], {name, ".db"}, shape, lora.rank, out);
  }

  static FactorGrad take(CallMemory& call, std::optional<TensorOut>& arg, const pybind11::object& value, ArgName name,
                         const ExpertShape& shape, int64_t rank, int64_t dim) {
    const TensorOut& grad = arg.emplace(call, value, name, kF32, Shape{shape.num_experts, rank, dim}, Layout::kStrided);
    if (dim == 1 || grad.stride(2) == 1) return {grad.f32(), grad.stride(0), grad.stride(1), 1};
    if ((shape.num_experts > 1 && grad.stride(0) != 1) || (rank > 1 && grad.stride(1) != shape.num_experts))
      grad.refuse("a last dimension of stride 1, or experts fastest and ranks next");
    return {grad.f32(), 1, shape.num_experts, grad.stride(2)};
  }
};

// (gate [experts, inter], up [experts, inter], down [experts, hidden]) or None
struct BiasArg {
  std::optional<TensorIn> gate, up, down;
  ExpertBias view;

  BiasArg(CallMemory& call, const pybind11::object& value, const ExpertShape& shape) {
    if (value.is_none()) return;
    const pybind11::tuple parts = items_of(value, "bias", 3, "(gate, up, down) or None");
    const auto take = [&](std::optional<TensorIn>& arg, const pybind11::object& part, const char* name, int64_t width) {
      return arg.emplace(call, part, name, kF32, Shape{shape.num_experts, width}, Layout::kContiguous).f32();
    };
    view = {take(gate, parts[0], "gate bias", shape.inter), take(up, parts[1], "up bias", shape.inter),
            take(down, parts[2], "down bias", shape.hidden)};
  }
};

// What the forward keeps for the backward: written by the one, read by the other.
template <class Tensor>
struct TapeArg {
  std::optional<Tensor> g, u, xa_gate, xa_up;
  ForwardTape view;

  TapeArg(CallMemory& call, const pybind11::object& g_, const pybind11::object& u_, const pybind11::object& xa_,
          const ExpertShape& shape, const ExpertLora& lora, int64_t rows) {
    if (g_.is_none() != u_.is_none()) throw pybind11::value_error("g and u: expected both or none of them");
    const Shape products{rows, shape.inter_stride()};
    if (!g_.is_none()) {
      g.emplace(call, g_, "g", kF16, products, Layout::kContiguous);
      u.emplace(call, u_, "u", kF16, products, Layout::kContiguous);
      view.g = const_cast<f16_t*>(g->f16()), view.u = const_cast<f16_t*>(u->f16());
    }
    if (xa_.is_none()) return;
    const pybind11::tuple parts = items_of(xa_, "xa", 2, "(x A^T of gate or None, of up or None) or None");
    const auto keep = [&](std::optional<Tensor>& arg, const pybind11::object& part, const char* name,
                          const LoraView& one) {
      if (part.is_none()) return static_cast<float*>(nullptr);
      if (!g) throw pybind11::value_error(std::string(name) + ": expected g and u beside it");
      arg.emplace(call, part, name, kF32, Shape{rows, one.rank}, Layout::kContiguous);
      return const_cast<float*>(arg->f32());
    };
    view.xa_gate = keep(xa_gate, parts[0], "xa gate", lora.gate);
    view.xa_up = keep(xa_up, parts[1], "xa up", lora.up);
  }
};

// What forward and backward have in common.
struct CallArgs {
  TensorIn x, ids, weights;
  pybind11::tuple parts;
  LoraArg gate, up, down;
  BiasArg bias;
  MoeInput input;
  ExpertLora lora;

  CallArgs(CallMemory& call, const ExpertShape& shape, const pybind11::object& x_, const pybind11::object& ids_,
           const pybind11::object& weights_, const pybind11::object& lora_, const std::string& rows,
           const pybind11::object& bias_)
      : x(call, x_, "x", kBf16, {kAnySize, shape.hidden}, Layout::kContiguous),
        ids(call, ids_, "topk_ids", kI64, {x.size(0), kAnySize}, Layout::kContiguous),
        weights(call, weights_, "topk_weights", kF32, {x.size(0), ids.size(1)}, Layout::kContiguous),
        parts(items_of(lora_, "lora", 3, "those of gate, up and down")),
        gate(call, parts[0], "lora gate", shape, shape.hidden, shape.inter),
        up(call, parts[1], "lora up", shape, shape.hidden, shape.inter),
        down(call, parts[2], "lora down", shape, shape.inter, shape.hidden),
        bias(call, bias_, shape),
        input{x.size(0), ids.size(1), x.bf16(), ids.i64(), weights.f32(), rows_from_name(rows), bias.view},
        lora{gate.view, up.view, down.view} {}
};

}  // namespace kts
