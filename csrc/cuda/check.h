// Every CUDA call is checked, and a failure says which call, which error and which shapes.
//
// A launcher throws; its extern "C" entry, which bindings and tests call, turns that into a code and lora_ops_last_error().
#pragma once

#include <cuda_runtime.h>

#include <exception>
#include <stdexcept>
#include <string>

namespace lora_ops {

inline void check_cuda(cudaError_t error, const char* call, const std::string& shapes) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("lora_ops: ") + call + " failed with " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + "), " + shapes);
}

inline std::string shape(const char* name, long long size) {
  return std::string(name) + " = " + std::to_string(size);
}
// shapes("M", M, "K", K) is "M = 3, K = 4".
template <class... Rest>
std::string shapes(const char* name, long long size, Rest... rest) {
  if constexpr (sizeof...(rest) == 0) {
    return shape(name, size);
  } else {
    return shape(name, size) + ", " + shapes(rest...);
  }
}

constexpr int kSharedBytesWithoutOptIn = 48 * 1024;

// kernel<<<grid, threads, shared_bytes, stream>>>(params). Nothing to do where the grid is empty.
template <class Params>
void launch(const char* name, void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, void* stream,
            const Params& params, const std::string& shapes) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > kSharedBytesWithoutOptIn) {
    check_cuda(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "cudaFuncSetAttribute", std::string(name) + ", " + shapes);
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  check_cuda(cudaGetLastError(), name, shapes);
}

inline std::string& last_error() {
  thread_local std::string message;
  return message;
}

// The body of an extern "C" entry: 0, or 1 with the message kept for lora_ops_last_error() on this thread.
template <class Launcher>
int report_errors(Launcher&& launcher) {
  try {
    launcher();
    return 0;
  } catch (const std::exception& e) {
    last_error() = e.what();
    return 1;
  }
}

}  // namespace lora_ops

extern "C" __attribute__((used)) inline const char* lora_ops_last_error() {
  return lora_ops::last_error().c_str();
}
