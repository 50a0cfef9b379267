// Layout changes of LoRA factors, and what tells that a factor has been written.
#include <cstring>

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

constexpr int64_t kSamples = 64;  // per factor; a microsecond for those that no cache holds

template <class Load>
double sum_of_samples(int64_t count, Load&& load) {
  const int64_t step = count / kSamples + 1;
  double sum = 0.0;
  for (int64_t i = 0; i < count; i += step) sum += static_cast<double>(load(i));
  return sum;
}

double sample(const py::handle& factor) {
  if (factor.is_none()) return 0.0;
  const TensorArg values(py::reinterpret_borrow<py::object>(factor), "factor", "float", -1);
  values.expect_contiguous();
  const int64_t count = values.numel();
  if (std::strcmp(values.dtype(), "f32") == 0) return sum_of_samples(count, [&](int64_t i) { return values.f32()[i]; });
  if (std::strcmp(values.dtype(), "bf16") == 0)
    return sum_of_samples(count, [&](int64_t i) { return bf16_to_f32(values.bf16()[i]); });
  return sum_of_samples(count, [&](int64_t i) { return f16_to_f32(values.f16()[i]); });
}

py::tuple sample_factors(const py::tuple& factors) {
  py::tuple sums(factors.size());
  for (size_t i = 0; i < factors.size(); ++i) sums[i] = py::float_(sample(factors[i]));
  return sums;
}

}  // namespace

void bind_lora(py::module_& m) {
  m.def("operand_from_expert_minor", &to_operand, py::arg("stored"), py::arg("operand"));
  m.def("sample_factors", &sample_factors, py::arg("factors"),
        "Sums over a few values of contiguous f32, bf16 or f16 CPU tensors, 0 for None.");
}

}  // namespace kts
