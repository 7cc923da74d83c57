// dx = dy W0 + drop'(dS A)      (M, K) = (M, N) (N, K) + (M, r) (r, K), W0 in 4 bits
//
// gemm_4bit.cuh's kernel: a tile of dx is a chunk wide, a step 64 rows of the weight. Backward passes have many rows, so there
// is one tile.
#include "qlora_backward_dx.h"

#include "gemm_4bit_launch.cuh"

namespace lora_ops {
namespace {

using BackwardDx = Tile4Bit<Tile<64, 128, 64, 1, 3>, false>;

}

void launch_qlora_backward_dx(const CudaQloraBackwardDx& p, void* stream) {
  const char* name = "qlora_backward_dx";
  const std::string sizes = shapes("M", p.M, "K", p.K, "N", p.N, "r", p.r);
  const float keep_scale = p.dropout.threshold > 0 ? p.dropout.keep_scale : 1.f;
  const Gemm gemm = describe(name, p.M, p.K, p.N, p.r, p.dy, p.dS, transpose(p.lora_A), keep_scale, {}, p.dropout, p.dx, sizes);
  const auto with = with_weight<true>(name, gemm, p.dy, p.weight, p.K, sizes);
  if (p.dx.dtype == DType::bf16) {
    launch_tile_4bit<Bf16, BackwardDx, true>(name, with, stream, sizes);
  } else {
    launch_tile_4bit<Half, BackwardDx, true>(name, with, stream, sizes);
  }
}

}  // namespace lora_ops

int lora_ops_qlora_backward_dx(const lora_ops::CudaQloraBackwardDx* params, void* stream) {
  return lora_ops::report_errors([&] { lora_ops::launch_qlora_backward_dx(*params, stream); });
}
