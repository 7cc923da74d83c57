// dx = dy W0 + drop'((dS ∘ gate) A)      (M, K) = (M, N) (N, K) + (M, r) (r, K)
//
// gemm.cuh's kernel with dy as the dense operand and the transposes of the weight and of A: a weight (N, K) is read through
// ldmatrix.trans, a transposed view (1, N) in rows. The mask is drawn again, over the accumulators of the low-rank product.
#include "lora_backward_dx.h"

#include "lora_gemm.cuh"

namespace lora_ops {

void launch_lora_backward_dx(const CudaLoraBackwardDx& p, void* stream) {
  launch_gemm<GemmKernel<true>>(gemm_of("lora_backward_dx", p), stream);
}

}  // namespace lora_ops

int lora_ops_lora_backward_dx(const lora_ops::CudaLoraBackwardDx* params, void* stream) {
  return lora_ops::report_errors([&] { lora_ops::launch_lora_backward_dx(*params, stream); });
}
