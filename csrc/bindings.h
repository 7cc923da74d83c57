// What both extension modules take from Python: matrices and addresses.
#pragma once

#include <pybind11/pybind11.h>

#include "params.h"

namespace lora_ops {

// (address, row stride, column stride, dtype), or None for a matrix that is absent. So is any other tuple: a 4-bit weight's.
inline Matrix matrix(const pybind11::object& o) {
  if (o.is_none()) return {};
  const auto t = o.cast<pybind11::tuple>();
  if (t.size() != 4) return {};
  return {reinterpret_cast<void*>(t[0].cast<uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
          static_cast<DType>(t[3].cast<int>())};
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_tensor_calls(pybind11::module_& m);  // tensor_calls.cpp

}  // namespace lora_ops
