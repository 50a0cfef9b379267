// Threads, memory, machine facts.
#include <pybind11/stl.h>

#include "bindings.h"
#include "gil.h"
#include "kts/openmp.h"
#include "kts/thread_pool.h"
#include "kts/topology.h"
#include "kts/workspace.h"
#include "plain_arg.h"
#include "tensor_arg.h"

namespace py = pybind11;

namespace kts {

namespace {

void huge_pages(const py::object& tensor_) {
  CallMemory call;
  const TensorOut tensor(call, tensor_, "tensor", kAnyDType, Shape::any(), Layout::kContiguous);
  advise_huge_pages(tensor.bytes(), static_cast<size_t>(tensor.numel() * tensor.item_bytes()));
}

py::dict cpu_info() {
  const CpuInfo info = read_cpu_info();
  py::dict item;
  item["model_name"] = info.model_name;
  item["logical_cpus"] = info.logical_cpus;
  item["physical_cores"] = info.physical_cores;
  item["numa_nodes"] = info.numa_nodes;
  item["numa_node_ids"] = info.numa_node_ids;
  item["quota_cpus"] = info.quota_cpus > 0.0 ? py::object(py::float_(info.quota_cpus)) : py::object(py::none());
  return item;
}

}  // namespace

void bind_runtime(py::module_& m) {
  m.def(
      "set_threads",
      [](Number<"threads", int> threads, Number<"pools", int> pools, bool fake_nodes) {
        const GilRelease release;
        set_threads(threads, pools, fake_nodes);
      },
      py::arg("threads"), py::arg("pools") = 0, py::kw_only(), py::arg("fake_nodes") = false,
      "Threads beyond max_threads() are not started; pools=0: one per NUMA node. fake_nodes, for tests: up to "
      "1024 threads and pools, which share the machine's CPUs.");
  m.def("num_threads", &num_threads, py::call_guard<GilRelease>());
  m.def("num_pools", &num_pools, py::call_guard<GilRelease>());
  m.def("max_threads", [] { return max_threads(read_cpu_info()); });
  m.def("default_threads", [] { return default_threads(read_cpu_info()); });
  m.def("cpu_info", &cpu_info);
  m.def("advise_huge_pages", &huge_pages, py::arg("tensor"), "For memory that nobody has written yet; contiguous.");
  m.def("leave_openmp_threads", &leave_openmp_threads,
        "For processes in which torch's idle OpenMP threads sleep anyway, or are meant to spin.");
  m.def("workspace_growths", &pass_arena_growths);
}

}  // namespace kts
