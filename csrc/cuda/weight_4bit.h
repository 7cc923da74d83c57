// A weight (N, K) in 4 bits on a device: ../params.h's QuantizedWeight, whose offset stays there.
#pragma once

#include "../nf4.h"

namespace lora_ops {

constexpr int kNestedShift = 8;  // 256 scales under one nested_absmax

struct CudaQuantizedWeight {
  const uint8_t* codes;        // (N, row_bytes(K)), laid out as ../nf4.h says
  const void* absmax;          // (ceil(N K / blocksize)) fp32; uint8 where there is a nested_code
  const float* nested_absmax;  // one per 256 of absmax, or null
  const float* nested_code;    // (256), or null
  const float* offset;         // (1), or null
  int64_t blocksize;           // a power of two, at least 32
  QuantType quant_type;
};

}  // namespace lora_ops
