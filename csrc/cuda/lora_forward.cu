// y = m ∘ (x W0ᵀ + scaling · (S ∘ gate) Bᵀ) + bias      (M, N) = (M, K) (K, N) + (M, r) (r, N)
//
// gemm.cuh's kernel with x as the dense operand. A weight (N, K) is read in rows, a transposed view (1, N) through
// ldmatrix.trans. scaling multiplies the fp32 accumulators: neither S nor B is rounded with it.
#include "lora_forward.h"

#include "lora_gemm.cuh"

namespace lora_ops {

void launch_lora_forward(const CudaLoraForward& p, void* stream) {
  launch_gemm<GemmKernel<false>>(gemm_of("lora_forward", p), stream);
}

}  // namespace lora_ops

int lora_ops_lora_forward(const lora_ops::CudaLoraForward* params, void* stream) {
  return lora_ops::report_errors([&] { lora_ops::launch_lora_forward(*params, stream); });
}
