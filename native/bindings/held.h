// A layer or store inside its Python object. Python can make such an object without __init__ (by __new__, in the __init__ of a
// subclass), and pybind11 then gives functions fresh memory for it: zeros here, which are no layer.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

namespace kts {

template <class Layer>
class Held {
 public:
  template <class... Args>
  explicit Held(std::in_place_t, Args&&... args) : layer_(std::make_unique<Layer>(std::forward<Args>(args)...)) {}

  // Throws TypeError before __init__.
  Layer& operator*() const {
    if (layer_ == nullptr)
      throw pybind11::type_error("expected a layer or store, got one whose __init__ was not called");
    return *layer_;
  }
  Layer* operator->() const { return &**this; }

  static void* operator new(size_t bytes) {
    void* memory = std::calloc(1, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
  }
  static void operator delete(void* memory) { std::free(memory); }

 private:
  std::unique_ptr<Layer> layer_;
};

}  // namespace kts
