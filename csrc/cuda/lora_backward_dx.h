// dx = dy W0 + drop'((dS ∘ gate) A)
#pragma once

#include "params.h"

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

}  // namespace lora_ops

// 0, or 1 with the reason in lora_ops_last_error().
extern "C" int lora_ops_lora_backward_dx(const lora_ops::CudaLoraBackwardDx* params, void* stream);
