// Quantising to 4 bits and back, and bitsandbytes' packing of the codes.
//
// codes (N, row_bytes(K)) in the kernels' layout (nf4.h); absmax fp32, one per block of the flattened weight. Every matrix
// here is contiguous. Results do not depend on the number of threads.
#pragma once

#include "../nf4.h"
#include "../params.h"

namespace lora_ops {

struct FourBit {
  int64_t N, K;
  QuantType type;
  int64_t blocksize;
  uint8_t* codes;  // (N, row_bytes(K))
  float* absmax;   // (ceil(N K / blocksize))
};

// Fills w.codes and w.absmax from weight (N, K). Returns -1, or where in the flattened weight the first element lies that is
// not finite: then w.codes is not written.
int64_t quantize_4bit(const FourBit& w, const void* weight, DType dtype, int threads);

// weight (N, K) in `dtype`
void dequantize_4bit(const FourBit& w, void* weight, DType dtype, int threads);

// packed (ceil(N K / 2)): element i of the flattened weight in byte i / 2, the even ones in the high nibble.
void to_bitsandbytes(const FourBit& w, uint8_t* packed, int threads);
void from_bitsandbytes(const FourBit& w, const uint8_t* packed, int threads);

}  // namespace lora_ops
