// S = drop(x) Aᵀ
#pragma once

#include "segments.h"
#include "skinny.h"

namespace lora_ops {

struct LoraDown {
  int64_t M = 0, K = 0, r = 0;
  const void* x = nullptr;  // (M, K), rows x_row_stride elements apart
  int64_t x_row_stride = 0;
  DType x_dtype = DType::bf16;
  const void* lora_A = nullptr;  // (r, K) contiguous
  DType adapter_dtype = DType::bf16;
  DeviceDropout dropout;
  float* S = nullptr;  // (M, r) contiguous
  float* workspace = nullptr;
  int sm_count = 0;  // how many SMs the work is spread over: with the shapes, it fixes the order of summation
};

int64_t workspace_bytes(const LoraDown& op);
void launch_lora_down(const LoraDown& op, void* stream);

// With the segments' lora_A instead of lora_A: r is S's columns, at least the largest rank.
int64_t workspace_bytes(const LoraDown& op, const Segments& segments);
void launch_lora_down_segments(const LoraDown& op, const Segments& segments, void* stream);

}  // namespace lora_ops
