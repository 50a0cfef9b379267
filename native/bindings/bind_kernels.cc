// Instruction sets, the kernel table and what is chosen from it.
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "bindings.h"
#include "kts/gemm.h"
#include "name_arg.h"
#include "plain_arg.h"

namespace py = pybind11;

namespace kts {

namespace {

py::list kernel_rows() {
  py::list rows;
  for (const KernelRow& row : kernel_table()) {
    const GemmProduct one_block{row.format, row.rows, row.direction, row.block_m, kPanel, kPanel};
    py::dict item;
    item["name"] = row.name;
    item["op"] = direction_name(row.direction);
    item["format"] = kernel_format_name(row.format);
    item["rows"] = rows_name(row.rows);
    item["isa"] = isa_name(row.isa);
    item["block_m"] = row.block_m;
    item["max_m"] = row.max_m;
    item["available"] = (row.isa & detect_isa()) != 0;
    item["selected"] = &select_gemm(one_block, active_isa()) == &row;
    rows.append(item);
  }
  return rows;
}

const char* refusal_name(Refusal refusal) {
  switch (refusal) {
    case Refusal::kNone:
      return "";
    case Refusal::kOtherProduct:
      return "product";
    case Refusal::kOtherRows:
      return "rows";
    case Refusal::kCpu:
      return "cpu";
    case Refusal::kNarrowed:
      return "narrowed";
    case Refusal::kManyRows:
      return "max_m";
    case Refusal::kLongRows:
      return "row_length";
  }
  return "";
}

// Every row for the weights and the direction: the chosen one, what the others would cost, or why they are out.
py::list judge_kernels(const Text<"format">& format, const Text<"rows">& rows, const Text<"op">& op, Number<"m"> m,
                       Number<"n"> n, Number<"k"> k) {
  constexpr int64_t kMost = int64_t{1} << 24;
  KTS_CHECK(m >= 1 && n >= 1 && k >= 1 && m <= kMost && n <= kMost && k <= kMost,
            "judge_kernels: expected m, n and k from 1 to 16777216");
  const GemmProduct product{
      weight_format(format.c_str(), 32).kind, rows_from_name(rows), direction_from_name(op), m, n, k};
  const std::vector<KernelVerdict> verdicts = judge_gemm(product, active_isa());
  const bool can = std::any_of(verdicts.begin(), verdicts.end(),
                               [](const KernelVerdict& verdict) { return verdict.refusal == Refusal::kNone; });
  const KernelRow* chosen = can ? &select_gemm(product, active_isa()) : nullptr;
  py::list items;
  for (const KernelVerdict& verdict : verdicts) {
    py::dict item;
    item["name"] = verdict.row->name;
    item["isa"] = isa_name(verdict.row->isa);
    item["rows"] = rows_name(verdict.row->rows);
    item["max_m"] = verdict.row->max_m;
    item["cycles"] = verdict.cycles;
    item["refusal"] = refusal_name(verdict.refusal);
    item["chosen"] = verdict.row == chosen;
    items.append(item);
  }
  return items;
}

// Block types of GGUF files that the kernels take as they are.
py::list block_types() {
  py::list types;
  for (const BlockTypeInfo& type : kBlockTypes) {
    py::dict item;
    item["name"] = type.name;
    item["format"] = kernel_format_name(weight_format(type.name, 0).kind);
    item["block"] = type.block;
    item["block_bytes"] = type.block_bytes;
    types.append(item);
  }
  return types;
}

}  // namespace

void bind_kernels(py::module_& m) {
  m.def("isa_detected", [] { return isa_names(detect_isa()); });
  m.def("isa_active", &active_isa_name);
  m.def("set_isa", [](const Text<"name">& name) { set_isa(name); }, py::arg("name"));
  m.def("amx_refusal", [] { return std::string(amx_refusal()); });
  m.def("block_types", &block_types);
  m.def("kernel_rows", &kernel_rows);
  m.def("judge_kernels", &judge_kernels, py::arg("format"), py::arg("rows"), py::arg("op"), py::arg("m"), py::arg("n"),
        py::arg("k"), "What would be chosen for m rows and weights [n, k], and why not the other rows of the table.");
  m.def("default_rows", [](const Text<"format">& format) {
    return rows_name(default_rows(weight_format(format.c_str(), 32).kind, active_isa()));
  });
}

}  // namespace kts
