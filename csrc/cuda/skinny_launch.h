// From what a skinny op is at run time to the kernel compiled for it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "check.h"
#include "skinny.h"

namespace lora_ops {

constexpr int kMaxRanks = 64;  // of one block; more are further blocks

// Whether every row of a matrix starts at a multiple of 16 bytes.
inline bool vectors(const void* data, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size_of(dtype) % 16 == 0;
}

template <typename T>
struct Type {
  using type = T;
};

// call(Type<T>, Type<Adapter>, integral_constant<int, ranks of a block>, bool_constant<vector>)
template <typename Call>
void dispatch(DType x, DType adapter, int64_t r, bool vector, Call call) {
  const auto with_vector = [&](auto t, auto a, auto ranks) {
    vector ? call(t, a, ranks, std::true_type{}) : call(t, a, ranks, std::false_type{});
  };
  const auto with_ranks = [&](auto t, auto a) {
    if (r <= 16) {
      with_vector(t, a, std::integral_constant<int, 16>{});
    } else if (r <= 32) {
      with_vector(t, a, std::integral_constant<int, 32>{});
    } else {
      with_vector(t, a, std::integral_constant<int, kMaxRanks>{});
    }
  };
  const auto with_adapter = [&](auto t) { adapter == DType::f32 ? with_ranks(t, Type<float>{}) : with_ranks(t, t); };
  x == DType::bf16 ? with_adapter(Type<__nv_bfloat16>{}) : with_adapter(Type<__half>{});
}

template <typename Args>
void launch_kernel(void (*kernel)(Args), dim3 grid, int threads, int shared_bytes, const Args& args, void* stream) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "cudaFuncSetAttribute");
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args);
  check(cudaGetLastError(), "launch");
}

}  // namespace lora_ops
