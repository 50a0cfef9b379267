// Layout changes of LoRA factors, and what tells that a factor has been written.
#include "bindings.h"
#include "gil.h"
#include "kts/lora_layout.h"
#include "plain_arg.h"
#include "tensor_arg.h"

namespace py = pybind11;

namespace kts {

namespace {

void to_operand(const py::object& stored_, const py::object& operand_) {
  CallMemory call;
  const TensorOut operand(call, operand_, "operand", kF32, {kAnySize, kAnySize, kAnySize}, Layout::kContiguous);
  const LoraLayout layout{operand.size(0), operand.size(1), operand.size(2)};
  if (operand.numel() == 0) operand.refuse("a factor with numbers in it");
  const TensorIn stored(call, stored_, "stored", kF32, {layout.dim, layout.rank * layout.num_experts},
                        Layout::kContiguous);
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
  CallMemory call;
  const TensorIn values(call, py::reinterpret_borrow<py::object>(factor), "factor", kAnyFloat, Shape::any(),
                        Layout::kContiguous);
  const int64_t count = values.numel();
  if (values.dtype() == kF32) return sum_of_samples(count, [at = values.f32()](int64_t i) { return at[i]; });
  if (values.dtype() == kBf16)
    return sum_of_samples(count, [at = values.bf16()](int64_t i) { return bf16_to_f32(at[i]); });
  return sum_of_samples(count, [at = values.f16()](int64_t i) { return f16_to_f32(at[i]); });
}

py::tuple sample_factors(const py::object& given) {
  if (!py::isinstance<py::tuple>(given)) refuse_value("factors", "a tuple of tensors and None", given);
  const auto factors = py::reinterpret_borrow<py::tuple>(given);
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
