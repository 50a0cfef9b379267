// Numbers and texts from Python, refused in one line that names them: pybind11's own message has several, and prints every
// argument of the call, tensors included.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

namespace kts {

// The name of an argument, as a template argument.
template <size_t kBytes>
struct Label {
  constexpr Label(const char (&name)[kBytes]) {
    std::copy_n(name, kBytes, text);
  }  // NOLINT(google-explicit-constructor)
  char text[kBytes];
};

// Whole numbers within T's range, or any number for float.
template <Label kName, class T = int64_t>
struct Number {
  T value{};
  operator T() const { return value; }  // NOLINT(google-explicit-constructor)
};

// A text without zero bytes, as functions take it that read up to the first one.
template <Label kName>
struct Text {
  std::string value;
  operator const std::string&() const { return value; }  // NOLINT(google-explicit-constructor)
  const char* c_str() const { return value.c_str(); }
};

[[noreturn]] void refuse_value(const std::string& name, const std::string& expected, pybind11::handle value);
float to_float(pybind11::handle value, const char* name);
std::string to_text(pybind11::handle value, const char* name);
// Throws ValueError for numbers below `least` or above `most`; both fit into 64 bits, and one of them is below 2^63.
int64_t to_signed(pybind11::handle value, const char* name, int64_t least, int64_t most);
uint64_t to_unsigned(pybind11::handle value, const char* name);
// The items of a tuple; `what` they are goes into the message.
pybind11::tuple items_of(const pybind11::object& value, const char* name, size_t count, const char* what);

}  // namespace kts

namespace pybind11::detail {

template <kts::Label kName, class T>
struct type_caster<kts::Number<kName, T>> {
  using Type = kts::Number<kName, T>;
  PYBIND11_TYPE_CASTER(Type, const_name("number"));
  bool load(handle from, bool) {
    if constexpr (std::is_same_v<T, float>)
      value.value = kts::to_float(from, kName.text);
    else if constexpr (std::is_same_v<T, uint64_t>)
      value.value = kts::to_unsigned(from, kName.text);
    else
      value.value = static_cast<T>(
          kts::to_signed(from, kName.text, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
    return true;
  }
};

template <kts::Label kName>
struct type_caster<kts::Text<kName>> {
  PYBIND11_TYPE_CASTER(kts::Text<kName>, const_name("str"));
  bool load(handle from, bool) {
    value.value = kts::to_text(from, kName.text);
    return true;
  }
};

}  // namespace pybind11::detail
