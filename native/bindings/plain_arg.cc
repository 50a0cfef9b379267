#include "plain_arg.h"

namespace py = pybind11;

namespace kts {

namespace {

// The value as int; whatever gives an index is one (numpy's integers).
py::object whole(py::handle value, const char* name) {
  PyObject* number = PyNumber_Index(value.ptr());
  if (number == nullptr) {
    PyErr_Clear();
    refuse_value(name, "a whole number", value);
  }
  return py::reinterpret_steal<py::object>(number);
}

}  // namespace

void refuse_value(const std::string& name, const std::string& expected, py::handle value) {
  throw py::type_error(name + ": expected " + expected + ", got " + std::string(py::str(py::type::handle_of(value))));
}

float to_float(py::handle value, const char* name) {
  const double number = PyFloat_AsDouble(value.ptr());
  if (number == -1.0 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    refuse_value(name, "a number of 64 bits", value);
  }
  return static_cast<float>(number);
}

std::string to_text(py::handle value, const char* name) {
  Py_ssize_t bytes = 0;
  const char* text = PyUnicode_Check(value.ptr()) ? PyUnicode_AsUTF8AndSize(value.ptr(), &bytes) : nullptr;
  if (text == nullptr) {
    PyErr_Clear();
    refuse_value(name, "a text", value);
  }
  std::string copy(text, static_cast<size_t>(bytes));
  if (copy.find('\0') != std::string::npos)
    throw py::value_error(std::string(name) + ": expected a name, got one with a zero byte");
  return copy;
}

int64_t to_signed(py::handle value, const char* name, int64_t least, int64_t most) {
  int overflow = 0;
  const int64_t number = PyLong_AsLongLongAndOverflow(whole(value, name).ptr(), &overflow);
  if (overflow != 0 || number < least || number > most)
    throw py::value_error(std::string(name) + ": expected a number from " + std::to_string(least) + " to " +
                          std::to_string(most) + ", got a " + (overflow > 0 || number > most ? "larger" : "lower") +
                          " one");
  return number;
}

uint64_t to_unsigned(py::handle value, const char* name) {
  const uint64_t number = PyLong_AsUnsignedLongLong(whole(value, name).ptr());
  if (number == UINT64_MAX && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw py::value_error(std::string(name) + ": expected a number from 0 to 2^64 - 1, got another one");
  }
  return number;
}

pybind11::tuple items_of(const pybind11::object& value, const char* name, size_t count, const char* what) {
  if (!pybind11::isinstance<pybind11::tuple>(value) || pybind11::len(value) != count)
    throw pybind11::value_error(std::string(name) + ": expected " + what + ", got " +
                                std::string(pybind11::str(pybind11::type::of(value))) +
                                (pybind11::isinstance<pybind11::tuple>(value) ? " of another length" : ""));
  return pybind11::reinterpret_borrow<pybind11::tuple>(value);
}

}  // namespace kts
