// dS = s dy B ;  dB = s dyᵀ S ;  dbias = Σ_rows dy          one pass over dy
#pragma once

#include "skinny.h"

namespace lora_ops {

// An output that is null is not computed, and an input that only such outputs need may be null too.
struct LoraBackwardUp {
  int64_t M = 0, N = 0, r = 0;
  const void* dy = nullptr;  // (M, N), rows dy_row_stride elements apart
  int64_t dy_row_stride = 0;
  DType dy_dtype = DType::bf16;
  const void* lora_B = nullptr;  // (N, r) contiguous
  const float* S = nullptr;      // (M, r), rows S_row_stride elements apart
  DType adapter_dtype = DType::bf16;
  float scaling = 1.f;
  float* dS = nullptr;    // (M, r), rows dS_row_stride elements apart
  void* dB = nullptr;     // (N, r) contiguous
  void* dbias = nullptr;  // (N)
  DType dbias_dtype = DType::bf16;
  float* workspace = nullptr;
  int sm_count = 0;           // how many SMs the work is spread over: with the shapes, it fixes the order of summation
  int64_t S_row_stride = 0;   // 0: r
  int64_t dS_row_stride = 0;  // 0: r
};

int64_t workspace_bytes(const LoraBackwardUp& op);
void launch_lora_backward_up(const LoraBackwardUp& op, void* stream);

}  // namespace lora_ops
