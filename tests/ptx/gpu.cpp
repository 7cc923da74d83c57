// A GPU in the executor's place, for device.py: launchers run on the real runtime, and nothing is checked or counted.
//
// Buffers stay where they are: their pages are pinned and mapped, so that a GPU reads and writes them at the host's addresses.
#include <cuda_runtime.h>
#include <unistd.h>

#include <cstdint>
#include <string>
#include <unordered_set>

namespace {

std::string error;

bool failed(const char* call, cudaError_t e) {
  if (e != cudaSuccess && error.empty()) error = std::string(call) + ": " + cudaGetErrorString(e);
  return e != cudaSuccess;
}

}  // namespace

extern "C" {

void fake_cudart_reset() {
  error.clear();
  cudaGetLastError();
}
int ptx_load_module(const char*, const char*) {
  return 0;
}
void ptx_set_architecture(int) {}
void ptx_set_reverse_order(int) {}
void ptx_reset() {}
void ptx_initialise(void*, uint64_t) {}

// Pages that another buffer lies in, too, are mapped already, by this library or another of the process. They are never
// unmapped: device.py says what that asks of malloc.
void ptx_register_buffer(void* data, uint64_t size, int, int) {
  static std::unordered_set<uintptr_t> mapped;
  const uintptr_t bytes = sysconf(_SC_PAGESIZE), end = reinterpret_cast<uintptr_t>(data) + size;
  for (uintptr_t page = reinterpret_cast<uintptr_t>(data) / bytes * bytes; page < end; page += bytes) {
    if (!mapped.insert(page).second) continue;
    const cudaError_t e = cudaHostRegister(reinterpret_cast<void*>(page), bytes, cudaHostRegisterMapped);
    if (e == cudaErrorHostMemoryAlreadyRegistered) {
      cudaGetLastError();
    } else {
      failed("cudaHostRegister", e);
    }
  }
}

// After everything has run.
const char* ptx_reports() {
  failed("cudaDeviceSynchronize", cudaDeviceSynchronize());
  return error.c_str();
}
const char* ptx_error() {
  return "a GPU launches nothing by name";
}
int ptx_launch(const char*, const uint32_t*, const uint32_t*, uint32_t, void**) {
  return 1;
}
const char* ptx_counters() {
  return "";
}
const char* ptx_launches() {
  return "";
}
const char* ptx_traffic() {
  return "";
}
}
