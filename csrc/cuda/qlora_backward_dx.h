// dx = dy W0 + drop'(dS A), W0 in 4 bits
#pragma once

#include "params.h"
#include "weight_4bit.h"

namespace lora_ops {

struct CudaQloraBackwardDx {
  int64_t M, K, N, r;          // K a multiple of 128
  Matrix dy;                   // (M, N) bf16 or fp16, rows at multiples of 16 bytes
  CudaQuantizedWeight weight;  // (N, K)
  Matrix lora_A;               // (r, K) dy's dtype or fp32
  Matrix dx;                   // (M, K) dy's dtype
  const float* dS;             // (M, r) contiguous
  DeviceDropout dropout;
};

void launch_qlora_backward_dx(const CudaQloraBackwardDx& p, void* stream);

}  // namespace lora_ops

// 0, or 1 with the reason in lora_ops_last_error().
extern "C" int lora_ops_qlora_backward_dx(const lora_ops::CudaQloraBackwardDx* params, void* stream);
