// dx = dy W0 + drop'((dS ∘ gate) A)
#pragma once

#include "params.h"
#include "segments.h"

namespace lora_ops {

struct CudaLoraBackwardDx {
  int64_t M, K, N, r;
  Matrix dy;        // (M, N) bf16 or fp16
  Matrix weight;    // (N, K) dy's dtype, or absent: dx already holds dy W0
  Matrix lora_A;    // (r, K) dy's dtype or fp32
  Matrix dx;        // (M, K) dy's dtype
  const float* dS;  // (M, r), rows dS_row_stride elements apart
  DeviceDropout dropout;
  GemmTile tile = GemmTile::automatic;
  int64_t dS_row_stride = 0;    // 0: r
  const float* gate = nullptr;  // (M, r), rows gate_row_stride elements apart, or absent
  int64_t gate_row_stride = 0;  // 0: one gate (r) for all rows
};

void launch_lora_backward_dx(const CudaLoraBackwardDx& p, void* stream);

// dx = Σ_i dy_i W_i + drop'((dS ∘ gate) A) of `count` (1 ... kMaxGroup) layers that share x, in one launch and rounded once. Of
// the first one everything counts, with dS (M, Σ r) and A (Σ r, K) of all layers, one beside and below the other; of the others
// N, dy and weight. Weights are all (N, K), or all transposed views.
void launch_lora_backward_dx_group(const CudaLoraBackwardDx* ops, int count, void* stream);

// With the segments' lora_A. r is dS's columns, at least the largest rank; dS holds the scaling, and of lora_A only the dtype
// counts.
void launch_lora_backward_dx_segments(const CudaLoraBackwardDx& p, const Segments& segments, void* stream);

}  // namespace lora_ops

// 0, or 1 with the reason in lora_ops_last_error().
extern "C" int lora_ops_lora_backward_dx(const lora_ops::CudaLoraBackwardDx* params, void* stream);
extern "C" int lora_ops_lora_backward_dx_group(const lora_ops::CudaLoraBackwardDx* params, int count, void* stream);
extern "C" int lora_ops_lora_backward_dx_segments(const lora_ops::CudaLoraBackwardDx* params, const lora_ops::Segments* segments,
                                                  void* stream);
