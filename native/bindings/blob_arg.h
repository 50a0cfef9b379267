// Bytes through Python's buffer protocol.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "call_memory.h"
#include "gil.h"
#include "plain_arg.h"

namespace kts {

// So many contiguous bytes, which stay where they are as long as this lives; writable ones for Access::kWrite.
class BlobArg {
 public:
  BlobArg(CallMemory& call, const pybind11::object& buffer, const char* name, int64_t bytes, Access access)
      : info_(request(buffer, name, access)) {
    const bool is_flat = info_.ndim == 1 && info_.itemsize == 1 && (info_.size <= 1 || info_.strides[0] == 1);
    if (!is_flat || info_.size != bytes)
      throw pybind11::value_error(std::string(name) + ": expected " + std::to_string(bytes) +
                                  " contiguous bytes, got " + std::to_string(info_.size * info_.itemsize) +
                                  (is_flat ? "" : " of another layout"));
    call.add({name, "", access, static_cast<const char*>(info_.ptr), 1, 1, {bytes}, {1}});
  }
  const char* data() const { return static_cast<const char*>(info_.ptr); }
  // Of a blob for Access::kWrite.
  char* writable() const { return static_cast<char*>(info_.ptr); }

  // Keeps the memory of three blobs, and ends with the last copy, in any thread.
  static std::shared_ptr<const void> keep(BlobArg&& a, BlobArg&& b, BlobArg&& c) {
    using Infos = std::array<pybind11::buffer_info, 3>;
    auto* infos = new Infos{std::move(a.info_), std::move(b.info_), std::move(c.info_)};
    return std::shared_ptr<const void>(infos, [](const Infos* kept) {
      call_python([kept] {
        const pybind11::gil_scoped_acquire gil;
        delete kept;
      });
    });
  }

 private:
  static pybind11::buffer_info request(const pybind11::object& buffer, const char* name, Access access) {
    if (PyObject_CheckBuffer(buffer.ptr()) == 0) refuse_value(name, "a buffer of bytes", buffer);
    return pybind11::reinterpret_borrow<pybind11::buffer>(buffer).request(access == Access::kWrite);
  }

  pybind11::buffer_info info_;
};

}  // namespace kts
