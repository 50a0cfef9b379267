// ExpertStore: converts and checks arguments, releases the GIL, calls.
#include "kts/expert_store.h"

#include <memory>
#include <string>
#include <tuple>

#include "bindings.h"
#include "blob_arg.h"
#include "gil.h"
#include "held_store.h"
#include "name_arg.h"
#include "plain_arg.h"
#include "tensor_arg.h"

namespace py = pybind11;

namespace kts {

namespace {

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

ExpertShape make_shape(int64_t num_experts, int64_t hidden, int64_t inter, const py::object& format, int group_size) {
  const ExpertShape shape{num_experts, hidden, inter, make_formats(format, group_size)};
  check_shape(shape);
  return shape;
}

// bf16 [n, k], or uint8 [n, bytes of a row] where the format is f16 or a block type.
struct WeightArg {
  TensorIn tensor;

  WeightArg(CallMemory& call, const py::object& value, const char* name, WeightFormat format, int64_t n, int64_t k)
      : tensor(call, value, name, format.kind < Format::kF16 ? kBf16 : kU8,
               {n, format.kind < Format::kF16 ? k : block_row_bytes(format, k)}, Layout::kRows) {}
  ExpertStore::WeightRows rows() const {
    if (tensor.dtype() == kBf16) return {tensor.bf16(), 2 * tensor.stride(0)};
    return {tensor.u8(), tensor.stride(0)};
  }
};

void load_expert(const HeldStore& store, Number<"expert"> expert, const py::object& gate_, const py::object& up_,
                 const py::object& down_) {
  const ExpertShape& s = store->shape();
  CallMemory call;
  const WeightArg gate(call, gate_, "gate", s.format.gate, s.inter, s.hidden);
  const WeightArg up(call, up_, "up", s.format.up, s.inter, s.hidden);
  const WeightArg down(call, down_, "down", s.format.down, s.hidden, s.inter);
  const GilRelease release;
  store->load_expert(expert, gate.rows(), up.rows(), down.rows());
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

void load_expert_int4(const HeldStore& store, Number<"expert"> expert, const py::object& gate_, const py::object& up_,
                      const py::object& down_) {
  const ExpertShape& s = store->shape();
  const WeightFormat format = s.format.gate;
  KTS_CHECK(format.any_scale, "load_expert_int4: expected a layer of format rawint4");
  CallMemory call;
  const StoredArg gate(call, gate_, "gate", s.inter, s.hidden, format.group);
  const StoredArg up(call, up_, "up", s.inter, s.hidden, format.group);
  const StoredArg down(call, down_, "down", s.hidden, s.inter, format.group);
  const GilRelease release;
  store->load_expert_int4(expert, gate.view(), up.view(), down.view());
}

void unpack_expert(const HeldStore& store, Number<"expert"> expert, const py::object& gate_, const py::object& up_,
                   const py::object& down_, const Text<"dtype">& dtype_) {
  const ExpertShape& s = store->shape();
  const DType dtype = result_dtype("dtype", dtype_);
  CallMemory call;
  const TensorOut gate(call, gate_, "gate", dtype, {s.inter, s.hidden}, Layout::kRows);
  const TensorOut up(call, up_, "up", dtype, {s.inter, s.hidden}, Layout::kRows);
  const TensorOut down(call, down_, "down", dtype, {s.hidden, s.inter}, Layout::kRows);
  const GilRelease release;
  if (dtype == kBf16) {
    store->unpack_expert(expert, gate.bf16(), gate.stride(0), up.bf16(), up.stride(0), down.bf16(), down.stride(0));
  } else {
    store->unpack_expert(expert, gate.f32(), gate.stride(0), up.f32(), up.stride(0), down.f32(), down.stride(0));
  }
}

// The blobs of one expert.
struct BlobArgs {
  CallMemory call;
  BlobArg gate, up, down;

  BlobArgs(const ExpertStore& store, const py::object& gate_, const py::object& up_, const py::object& down_,
           Access access)
      : gate(call, gate_, "gate", store.gate_blob_bytes(), access),
        up(call, up_, "up", store.up_blob_bytes(), access),
        down(call, down_, "down", store.down_blob_bytes(), access) {}
  ExpertBlobs<const char> read() const { return {gate.data(), up.data(), down.data()}; }
};

void map_expert(const HeldStore& store, Number<"expert"> expert, const py::object& gate, const py::object& up,
                const py::object& down) {
  BlobArgs blobs(*store, gate, up, down, Access::kRead);
  const ExpertBlobs<const char> views = blobs.read();
  auto owner = BlobArg::keep(std::move(blobs.gate), std::move(blobs.up), std::move(blobs.down));
  const GilRelease release;
  store->map_expert(expert, views, std::move(owner));
}

void copy_expert(const HeldStore& store, Number<"expert"> expert, const py::object& gate, const py::object& up,
                 const py::object& down) {
  const BlobArgs blobs(*store, gate, up, down, Access::kRead);
  const GilRelease release;
  store->copy_expert(expert, blobs.read());
}

void export_expert(const HeldStore& store, Number<"expert"> expert, const py::object& gate, const py::object& up,
                   const py::object& down) {
  const BlobArgs blobs(*store, gate, up, down, Access::kWrite);
  const GilRelease release;
  store->export_expert(expert, {blobs.gate.writable(), blobs.up.writable(), blobs.down.writable()});
}

// Waits for a call that changes experts.
template <int64_t (ExpertStore::*kCount)() const>
int64_t count(const HeldStore& store) {
  const ExpertStore& counted = *store;
  const GilRelease release;
  return (counted.*kCount)();
}

void bind_facts(py::class_<HeldStore>& store) {
  const auto shape_of = [](const HeldStore& held) -> const ExpertShape& { return held->shape(); };
  store.def_property_readonly("packed_bytes", [](const HeldStore& held) { return held->packed_bytes(); })
      .def_property_readonly("own_bytes", &count<&ExpertStore::own_bytes>)
      .def_property_readonly("missing_experts", &count<&ExpertStore::missing_experts>)
      .def_property_readonly("mapped_experts", &count<&ExpertStore::mapped_experts>)
      .def_property_readonly("blob_bytes",
                             [](const HeldStore& held) {
                               return std::make_tuple(held->gate_blob_bytes(), held->up_blob_bytes(),
                                                      held->down_blob_bytes());
                             })
      .def_property_readonly("format",
                             [=](const HeldStore& held) {
                               const ExpertFormats& all = shape_of(held).format;
                               return std::string(all.is_uniform() ? format_name(all.gate) : "mixed");
                             })
      .def_property_readonly("formats",
                             [=](const HeldStore& held) {
                               const ExpertFormats& all = shape_of(held).format;
                               return py::make_tuple(format_name(all.gate), format_name(all.up), format_name(all.down));
                             })
      .def_property_readonly("group_size", [=](const HeldStore& held) { return shape_of(held).format.gate.group; })
      .def_property_readonly("num_shards", [](const HeldStore& held) { return held->num_shards(); })
      .def_property_readonly("num_experts", [=](const HeldStore& held) { return shape_of(held).num_experts; })
      .def_property_readonly("hidden", [=](const HeldStore& held) { return shape_of(held).hidden; })
      .def_property_readonly("inter", [=](const HeldStore& held) { return shape_of(held).inter; });
}

}  // namespace

void bind_store(py::module_& m) {
  py::class_<HeldStore> store(m, "ExpertStore");
  store
      .def(py::init([](Number<"num_experts"> num_experts, Number<"hidden"> hidden, Number<"inter"> inter,
                       const py::object& format, Number<"group_size", int> group_size) {
             const ExpertShape shape = make_shape(num_experts, hidden, inter, format, group_size);
             const GilRelease release;  // it waits for a pass that is under way
             return std::make_unique<HeldStore>(std::in_place, shape);
           }),
           py::arg("num_experts"), py::arg("hidden"), py::arg("inter"), py::arg("format") = "bf16",
           py::arg("group_size") = 32)
      .def("load_expert", &load_expert, py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"))
      .def("load_expert_int4", &load_expert_int4, py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"))
      .def("unpack_expert", &unpack_expert, py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"),
           py::arg("dtype") = "bf16")
      .def("map_expert", &map_expert, py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"),
           "Memory that is used in place is held until the expert gets other weights.")
      .def("copy_expert", &copy_expert, py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"))
      .def("export_expert", &export_expert, py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"))
      .def_static(
          "packed_bytes_for",
          [](Number<"num_experts"> num_experts, Number<"hidden"> hidden, Number<"inter"> inter,
             const py::object& format, Number<"group_size", int> group_size) {
            return ExpertStore::packed_bytes_for(make_shape(num_experts, hidden, inter, format, group_size));
          },
          py::arg("num_experts"), py::arg("hidden"), py::arg("inter"), py::arg("format") = "bf16",
          py::arg("group_size") = 32);
  bind_facts(store);
}

}  // namespace kts
