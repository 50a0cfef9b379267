// Layout changes of LoRA factors.
#include "bindings.h"
#include "gil.h"
#include "kts/lora_layout.h"
#include "tensor_arg.h"

namespace py = pybind11;

namespace kts {

namespace {

LoraLayout layout_of(const TensorArg& canonical, const TensorArg& stored) {
  const LoraLayout layout{canonical.size(0), canonical.size(1), canonical.size(2)};
  canonical.expect_contiguous();
  stored.expect_shape({layout.dim, layout.rank * layout.num_experts}).expect_contiguous();
  return layout;
}

void to_operand(const py::object& stored_, const py::object& operand_) {
  const TensorArg stored(stored_, "stored", "f32", 2), operand(operand_, "operand", "f32", 3);
  const LoraLayout layout = layout_of(operand, stored);
  const GilRelease release;
  operand_from_expert_minor(layout, stored.f32(), operand.f32());
}

void to_stored(const py::object& gradient_, const py::object& stored_) {
  const TensorArg gradient(gradient_, "gradient", "f32", 3), stored(stored_, "stored", "f32", 2);
  const LoraLayout layout = layout_of(gradient, stored);
  const GilRelease release;
  gradient_to_expert_minor(layout, gradient.f32(), stored.f32());
}

}  // namespace

void bind_lora(py::module_& m) {
  m.def("operand_from_expert_minor", &to_operand, py::arg("stored"), py::arg("operand"));
  m.def("gradient_to_expert_minor", &to_stored, py::arg("gradient"), py::arg("stored"));
}

}  // namespace kts
