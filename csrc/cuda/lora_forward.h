// y = m ∘ (x W0ᵀ + scaling · (S ∘ gate) Bᵀ) + bias
#pragma once

#include "params.h"
#include "segments.h"

namespace lora_ops {

struct CudaLoraForward {
  int64_t M, K, N, r;
  Matrix x;        // (M, K) bf16 or fp16
  Matrix weight;   // (N, K) x's dtype, or absent: y already holds x W0ᵀ
  Matrix lora_B;   // (N, r) x's dtype or fp32
  Matrix bias;     // (1, N) x's dtype or fp32, or absent
  Matrix y;        // (M, N) x's dtype
  const float* S;  // (M, r), rows S_row_stride elements apart
  float scaling;
  GemmTile tile = GemmTile::automatic;
  int64_t S_row_stride = 0;     // 0: r
  const float* gate = nullptr;  // (M, r), rows gate_row_stride elements apart, or absent
  int64_t gate_row_stride = 0;  // 0: one gate (r) for all rows
  Matrix m;                     // (1, N) x's dtype or fp32, or absent
};

void launch_lora_forward(const CudaLoraForward& p, void* stream);

// `count` (1 ... kMaxGroup) layers that share x, in one launch: one M, K, dtype and tile (the first one's), and weights that
// are all (N, K), or all transposed views. Everything else is each layer's own. S of all may be columns of one matrix, for
// which lora_down ran once with the lora_A of all, one below the other.
void launch_lora_forward_group(const CudaLoraForward* ops, int count, void* stream);

// With the segments' lora_B and scaling, which multiplies p's. r is S's columns, at least the largest rank; of lora_B only the
// dtype counts.
void launch_lora_forward_segments(const CudaLoraForward& p, const Segments& segments, void* stream);

}  // namespace lora_ops

// 0, or 1 with the reason in lora_ops_last_error().
extern "C" int lora_ops_lora_forward(const lora_ops::CudaLoraForward* params, void* stream);
extern "C" int lora_ops_lora_forward_group(const lora_ops::CudaLoraForward* params, int count, void* stream);
extern "C" int lora_ops_lora_forward_segments(const lora_ops::CudaLoraForward* params, const lora_ops::Segments* segments,
                                              void* stream);
