// weight = values[code] · absmax, both levels of scales undone in one pass
#pragma once

#include "params.h"
#include "weight_4bit.h"

namespace lora_ops {

struct CudaDequantize4Bit {
  int64_t N, K;
  CudaQuantizedWeight weight;
  void* out;  // (N, K) contiguous
  DType dtype;
};

void launch_dequantize_4bit(const CudaDequantize4Bit& p, void* stream);

}  // namespace lora_ops

// 0, or 1 with the reason in lora_ops_last_error().
extern "C" int lora_ops_dequantize_4bit(const lora_ops::CudaDequantize4Bit* params, void* stream);
