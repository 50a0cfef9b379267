#include "dlpack.h"

#include "gil.h"

namespace py = pybind11;

namespace kts {

namespace {

// DLPackExchangeAPI of the specification from v1.3 on: functions of a tensor type, without a capsule per tensor.
struct DlExchange {
  uint32_t major;
  uint32_t minor;
  const DlExchange* previous;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*borrow)(void* tensor, DlTensor* out);  // may be null; valid while the tensor lives; 0 = done
};
constexpr uint32_t kExchangeMajor = 1;

// Of the tensor's type, null where it has none: torch before 2.10.
const DlExchange* exchange_of(const py::object& tensor) {
  static PyObject* const name = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  PyObject* capsule = PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())), name);
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  const auto* api = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);  // the table outlives it: it is static
  if (api == nullptr) PyErr_Clear();
  while (api != nullptr && api->major != kExchangeMajor) api = api->previous;
  return api != nullptr && api->borrow != nullptr ? api : nullptr;
}

// Calls tensor.name(); null and no error set where there is no such method.
py::object call_method(const py::object& tensor, PyObject* name) {
  PyObject* const self = tensor.ptr();
  PyObject* result = PyObject_VectorcallMethod(name, &self, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  if (result != nullptr) return py::reinterpret_steal<py::object>(result);
  if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
  PyErr_Clear();
  return {};
}

// torch's messages have the C++ stack below the first line. Interrupts and lack of memory pass as they are.
[[noreturn]] void refuse_in_a_line(const py::error_already_set& error, const std::string& name) {
  if (!error.matches(PyExc_Exception) || error.matches(PyExc_MemoryError)) throw error;
  const std::string text = py::str(error.value());
  throw py::value_error(name + ": expected a tensor with memory of its own on the CPU, got one without (" +
                        text.substr(0, text.find('\n')) + ")");
}

py::object capsule_of(const py::object& tensor) {
  const py::object detached = requires_grad(tensor) ? py::object(tensor.attr("detach")()) : tensor;
  return detached.attr("__dlpack__")();
}

}  // namespace

bool requires_grad(const py::object& tensor) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  PyObject* value = PyObject_GetAttr(tensor.ptr(), name);
  if (value == nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
    PyErr_Clear();
    return false;
  }
  return py::reinterpret_steal<py::object>(value).ptr() == Py_True;
}

py::object borrow(const py::object& tensor, const std::string& name, DlTensor* out) {
  try {
    if (const DlExchange* api = exchange_of(tensor)) {
      if (call_python([&] { return api->borrow(tensor.ptr(), out); }) != 0) throw py::error_already_set();
      return tensor;
    }
    if (!py::hasattr(tensor, "__dlpack__"))
      throw py::type_error(name + ": expected a tensor, got " + std::string(py::str(py::type::of(tensor))));
    py::object capsule = call_python([&] { return capsule_of(tensor); });
    const auto* dl = static_cast<const DlTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (dl == nullptr) throw py::error_already_set();
    *out = *dl;
    return capsule;
  } catch (const py::error_already_set& error) {
    refuse_in_a_line(error, name);
  }
}

bool is_negated(const py::object& tensor) {
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  const py::object negated = call_python([&] { return call_method(tensor, name); });
  return negated && negated.ptr() == Py_True;
}

py::object plain_copy(const py::object& tensor, const std::string& name) {
  static PyObject* const detach = PyUnicode_InternFromString("detach");
  static PyObject* const clone = PyUnicode_InternFromString("clone");
  static PyObject* const resolve = PyUnicode_InternFromString("resolve_neg");
  return call_python([&] {
    py::object copy = call_method(tensor, detach);
    copy = copy ? call_method(copy, clone) : copy;
    copy = copy ? call_method(copy, resolve) : copy;
    if (!copy)
      throw py::value_error(name + ": expected memory aligned to the elements, got other memory; copy it first");
    return copy;
  });
}

}  // namespace kts
