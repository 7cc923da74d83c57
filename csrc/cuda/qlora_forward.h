// y = x W0ᵀ + scaling · S Bᵀ + bias, W0 in 4 bits
#pragma once

#include "params.h"
#include "weight_4bit.h"

namespace lora_ops {

struct CudaQloraForward {
  int64_t M, K, N, r;          // K a multiple of 128
  Matrix x;                    // (M, K) bf16 or fp16, rows at multiples of 16 bytes
  CudaQuantizedWeight weight;  // (N, K)
  Matrix lora_B;               // (N, r) x's dtype or fp32
  Matrix bias;                 // (1, N) x's dtype or fp32, or absent
  Matrix y;                    // (M, N) x's dtype
  const float* S;              // (M, r) contiguous
  float scaling;
  GemmTile tile = GemmTile::automatic;  // small or medium
};

void launch_qlora_forward(const CudaQloraForward& p, void* stream);

}  // namespace lora_ops

// 0, or 1 with the reason in lora_ops_last_error().
extern "C" int lora_ops_qlora_forward(const lora_ops::CudaQloraForward* params, void* stream);
