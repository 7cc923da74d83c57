// dx = dy W0 + drop'(dS A_i)      in the rows of segment i
//
// gemm_segments.cuh's kernel with dy as the dense operand.
#include "gemm_segments.cuh"
#include "lora_gemm.cuh"

namespace lora_ops {

void launch_lora_backward_dx_segments(const CudaLoraBackwardDx& p, const Segments& segments, void* stream) {
  launch_segments<true>(gemm_of("lora_backward_dx_segments", p), segments, stream);
}

}  // namespace lora_ops

int lora_ops_lora_backward_dx_segments(const lora_ops::CudaLoraBackwardDx* params, const lora_ops::Segments* segments,
                                       void* stream) {
  return lora_ops::report_errors([&] { lora_ops::launch_lora_backward_dx_segments(*params, *segments, stream); });
}
