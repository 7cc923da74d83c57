// A kernel's call from Python, without the lock of the interpreter.
#pragma once

#include <pybind11/pybind11.h>

#include "cpu/threads.h"

namespace lora_ops {

// Whether the call may go on. Ctrl-C and other signals are Python's main thread's to handle: their handlers run here, and one
// that raises ends the call.
bool no_signal_raised();

template <class F>
auto released(const F& kernel) {
  Call call(&no_signal_raised);
  const auto run = [&] {
    pybind11::gil_scoped_release release;
    return kernel();
  };
  if constexpr (std::is_void_v<decltype(kernel())>) {
    run();
    if (call.stopped()) throw pybind11::error_already_set();
  } else {
    const auto result = run();
    if (call.stopped()) throw pybind11::error_already_set();
    return result;
  }
}

}  // namespace lora_ops
