// codes and absmax of a weight, one level of scales
#pragma once

#include "../nf4.h"
#include "params.h"

namespace lora_ops {

struct CudaQuantize4Bit {
  int64_t N, K;
  QuantType quant_type;
  int64_t blocksize;   // a power of two, at least 32
  const void* weight;  // (N, K) contiguous
  DType dtype;
  uint8_t* codes;  // (N, row_bytes(K)), laid out as ../nf4.h says
  float* absmax;   // (ceil(N K / blocksize)). Infinite or NaN where an element of the block is, and then its codes mean nothing
};

void launch_quantize_4bit(const CudaQuantize4Bit& p, void* stream);

}  // namespace lora_ops

// 0, or 1 with the reason in lora_ops_last_error().
extern "C" int lora_ops_quantize_4bit(const lora_ops::CudaQuantize4Bit* params, void* stream);
