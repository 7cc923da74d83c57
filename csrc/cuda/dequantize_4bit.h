// weight = values[code] · absmax, both levels of scales undone in one pass
#pragma once

#include "../nf4.h"
#include "params.h"

namespace lora_ops {

struct CudaDequantize4Bit {
  int64_t N, K;
  QuantType quant_type;
  int64_t blocksize;           // a power of two, at least 32
  const uint8_t* codes;        // (N, row_bytes(K)), laid out as ../nf4.h says
  const void* absmax;          // (ceil(N K / blocksize)) fp32; uint8 where there is a nested_code
  const float* nested_absmax;  // one per 256 of absmax, or null
  const float* nested_code;    // (256), or null
  const float* offset;         // (1), or null
  void* weight;                // (N, K) contiguous
  DType dtype;
};

void launch_dequantize_4bit(const CudaDequantize4Bit& p, void* stream);

}  // namespace lora_ops
