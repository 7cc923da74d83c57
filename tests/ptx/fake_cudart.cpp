// The functions of the CUDA runtime that nvcc's host code and the launchers call, on top of the executor.
//
// So the launchers themselves are tested: a grid, block or shared-memory size that a real device refuses is refused here with
// the same error. Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "executor.h"

namespace {

constexpr uint32_t kSharedBytesWithoutOptIn = 48 * 1024;
constexpr uint32_t kMaxThreads = 1024, kMaxBlockX = 1024, kMaxBlockY = 1024, kMaxBlockZ = 64;
constexpr uint32_t kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535;

struct Function {
  std::string entry;
  uint32_t max_dynamic_shared_bytes;
};

struct CallConfiguration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

struct Runtime {
  std::map<const void*, Function> functions;  // by the address of the host stub
  std::vector<CallConfiguration> calls;
  cudaError_t last_error = cudaSuccess;

  cudaError_t fail(cudaError_t error, const std::string& what) {
    message = what;
    return last_error = error;
  }
  std::string message;
};

Runtime& runtime() {
  static Runtime instance;
  return instance;
}

uint32_t max_shared_bytes_per_block() {
  switch (ptx_architecture()) {
    case 80:
      return 163 * 1024;
    case 86:
    case 89:
    case 120:
      return 99 * 1024;
    default:
      return 227 * 1024;
  }
}

cudaError_t run(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared_bytes) {
  Runtime& cuda = runtime();
  const auto found = cuda.functions.find(stub);
  if (found == cuda.functions.end()) return cuda.fail(cudaErrorInvalidDeviceFunction, "not a kernel");
  const Function& function = found->second;
  try {
    const ptx::KernelLimits limits = ptx::kernel_limits(function.entry);
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0 || grid.x > kMaxGridX || grid.y > kMaxGridYZ ||
        grid.z > kMaxGridYZ || block.x > kMaxBlockX || block.y > kMaxBlockY || block.z > kMaxBlockZ || threads > kMaxThreads) {
      return cuda.fail(cudaErrorInvalidConfiguration, "grid or block");
    }
    if (threads > limits.max_threads) return cuda.fail(cudaErrorLaunchOutOfResources, "more threads than .maxntid");
    if (shared_bytes > function.max_dynamic_shared_bytes ||
        shared_bytes + limits.static_shared_bytes > max_shared_bytes_per_block()) {
      return cuda.fail(cudaErrorInvalidValue, "dynamic shared memory");
    }
    ptx::launch(function.entry, {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, static_cast<uint32_t>(shared_bytes)},
                arguments);
  } catch (const std::exception& e) {
    ptx::report("executor", e.what());
    return cuda.fail(cudaErrorLaunchFailure, e.what());
  }
  return cudaSuccess;
}

}  // namespace

extern "C" {

// A process that has just started: no error pending, no opt-ins.
void fake_cudart_reset() {
  runtime().last_error = cudaSuccess;
  for (auto& function : runtime().functions) function.second.max_dynamic_shared_bytes = kSharedBytesWithoutOptIn;
}

// What nvcc's host code calls at start-up and for <<<...>>>; crt/host_runtime.h declares it.

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* entry, int, uint3*, uint3*, dim3*, dim3*, int*) {
  runtime().functions[stub] = {entry, kSharedBytesWithoutOptIn};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
  runtime().calls.push_back({grid, block, shared_bytes, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  auto& calls = runtime().calls;
  if (calls.empty()) return runtime().fail(cudaErrorMissingConfiguration, "no configuration");
  const CallConfiguration call = calls.back();
  calls.pop_back();
  *grid = call.grid;
  *block = call.block;
  *shared_bytes = call.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = call.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                               cudaStream_t) {
  return run(kernel, grid, block, arguments, shared_bytes);
}

// cuda_runtime_api.h

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared_bytes, cudaStream_t) {
  return run(stub, grid, block, arguments, shared_bytes);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttributeID id = config->attrs[i].id;
    if (id != cudaLaunchAttributeProgrammaticStreamSerialization && id != cudaLaunchAttributePriority) {
      return runtime().fail(cudaErrorNotSupported, "launch attribute");
    }
  }
  return run(stub, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes);
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  Runtime& cuda = runtime();
  const auto found = cuda.functions.find(stub);
  if (found == cuda.functions.end()) return cuda.fail(cudaErrorInvalidDeviceFunction, "not a kernel");
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cuda.fail(cudaErrorNotSupported, "attribute");
  try {
    const uint32_t static_bytes = ptx::kernel_limits(found->second.entry).static_shared_bytes;
    if (value < 0 || value + static_bytes > max_shared_bytes_per_block()) {
      return cuda.fail(cudaErrorInvalidValue, "more shared memory than a block can have");
    }
  } catch (const std::exception& e) {
    ptx::report("executor", e.what());
    return cuda.fail(cudaErrorInvalidDeviceFunction, e.what());
  }
  found->second.max_dynamic_shared_bytes = static_cast<uint32_t>(value);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
  Runtime& cuda = runtime();
  const auto found = cuda.functions.find(stub);
  if (found == cuda.functions.end()) return cuda.fail(cudaErrorInvalidDeviceFunction, "not a kernel");
  try {
    const ptx::KernelLimits limits = ptx::kernel_limits(found->second.entry);
    std::memset(attributes, 0, sizeof *attributes);
    attributes->sharedSizeBytes = limits.static_shared_bytes;
    attributes->maxThreadsPerBlock = static_cast<int>(limits.max_threads);
    attributes->maxDynamicSharedSizeBytes = static_cast<int>(found->second.max_dynamic_shared_bytes);
    attributes->ptxVersion = attributes->binaryVersion = ptx_architecture();
  } catch (const std::exception& e) {
    ptx::report("executor", e.what());
    return cuda.fail(cudaErrorInvalidDeviceFunction, e.what());
  }
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = runtime().last_error;
  runtime().last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() {
  return runtime().last_error;
}
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorLaunchOutOfResources:
      return "cudaErrorLaunchOutOfResources";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    default:
      return "cudaError";
  }
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : runtime().message.c_str();
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : runtime().fail(cudaErrorInvalidDevice, "there is one device");
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = ptx_architecture() / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = ptx_architecture() % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(max_shared_bytes_per_block());
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = 4;  // few, so that grids which are sized by it stay small here
      return cudaSuccess;
    default:
      return runtime().fail(cudaErrorInvalidValue, "device attribute");
  }
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  ptx_initialise(data, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  ptx_initialise(to, bytes);
  return cudaSuccess;
}
}
