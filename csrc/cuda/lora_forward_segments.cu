// y = x W0ᵀ + scaling_i · S B_iᵀ + bias      in the rows of segment i
//
// gemm_segments.cuh's kernel with x as the dense operand.
#include "gemm_segments.cuh"
#include "lora_gemm.cuh"

namespace lora_ops {

void launch_lora_forward_segments(const CudaLoraForward& p, const Segments& segments, void* stream) {
  launch_segments<false>(gemm_of("lora_forward_segments", p), segments, stream);
}

}  // namespace lora_ops

int lora_ops_lora_forward_segments(const lora_ops::CudaLoraForward* params, const lora_ops::Segments* segments, void* stream) {
  return lora_ops::report_errors([&] { lora_ops::launch_lora_forward_segments(*params, *segments, stream); });
}
