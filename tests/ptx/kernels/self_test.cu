// Kernels that prove the executor itself: y = a x + y, a sum in shared memory, and one tile of a matrix product.
#include <cuda_runtime.h>

#include <cstdint>

struct Saxpy {
  const float* x;  // (n)
  float* y;        // (n)
  float a;
  int n;
};

namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) saxpy_kernel(const Saxpy args) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < args.n) args.y[i] = args.a * args.x[i] + args.y[i];
}

// sums[b] = the sum of the kThreads values of block b
__global__ void __launch_bounds__(kThreads) sum_kernel(const float* x, float* sums) {
  extern __shared__ float values[];
  values[threadIdx.x] = x[blockIdx.x * kThreads + threadIdx.x];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = values[0];
}

// D (16, 8) = A (16, 16) Bᵀ (8, 16), one warp; A and B bf16 row-major, D fp32
__global__ void __launch_bounds__(32) mma_kernel(const uint4* A, const uint4* B, float2* D) {
  __shared__ uint4 a[32], b[16];
  const int lane = threadIdx.x;
  const auto at = [](const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); };
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at(a + lane)), "l"(A + lane) : "memory");
  if (lane < 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at(b + lane)), "l"(B + lane) : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
  uint32_t fa[4], fb[2];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3])
               : "r"(at(a + lane % 16 * 2 + lane / 16))
               : "memory");
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(fb[0]), "=r"(fb[1])
               : "r"(at(b + lane % 8 * 2 + lane / 8 % 2))
               : "memory");
  float d[4] = {};
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
  D[lane / 4 * 4 + lane % 4] = {d[0], d[1]};
  D[(lane / 4 + 8) * 4 + lane % 4] = {d[2], d[3]};
}

}  // namespace

extern "C" int self_test_saxpy(const Saxpy* args, void* stream) {
  saxpy_kernel<<<(args->n + kThreads - 1) / kThreads, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*args);
  return cudaGetLastError();
}

// Takes shared_bytes instead of the kThreads floats it needs, and opts in for opt_in bytes where that is not 0.
extern "C" int self_test_sum(const float* x, float* sums, int blocks, int threads, int shared_bytes, int opt_in) {
  if (opt_in > 0) {
    const auto error = cudaFuncSetAttribute(sum_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, opt_in);
    if (error != cudaSuccess) return error;
  }
  sum_kernel<<<blocks, threads, shared_bytes>>>(x, sums);
  return cudaGetLastError();
}

extern "C" int self_test_mma(const void* A, const void* B, void* D) {
  mma_kernel<<<1, 32>>>(static_cast<const uint4*>(A), static_cast<const uint4*>(B), static_cast<float2*>(D));
  return cudaGetLastError();
}
