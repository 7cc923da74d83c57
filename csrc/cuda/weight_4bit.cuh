// Reading a weight in 4 bits: its table of values, and its scales with both levels undone.
#pragma once

#include "check.h"
#include "tile.cuh"
#include "weight_4bit.h"

namespace lora_ops {

// log2 of a block size.
inline int shift_of(const char* name, int64_t blocksize, const std::string& shapes) {
  require(blocksize >= 32 && (blocksize & (blocksize - 1)) == 0, name, "the block size is a power of two from 32", shapes);
  int shift = 0;
  while (blocksize >> shift > 1) ++shift;
  return shift;
}

// nested · nested_absmax + offset, rounded twice, as everywhere.
__device__ __forceinline__ float undo_nesting(float nested, float nested_absmax, float offset) {
  return __fadd_rn(__fmul_rn(nested, nested_absmax), offset);
}

__device__ __forceinline__ float scale_of(const CudaQuantizedWeight& w, int64_t block) {
  if (w.nested_code == nullptr) return static_cast<const float*>(w.absmax)[block];
  const float nested = w.nested_code[static_cast<const uint8_t*>(w.absmax)[block]];
  return undo_nesting(nested, w.nested_absmax[block >> kNestedShift], *w.offset);
}

// The table of values to shared memory, a thread per value. Threads of a block are at least kCodes; a barrier is the caller's.
__device__ __forceinline__ void store_values(uint32_t shared, const float (&values)[kCodes]) {
#pragma unroll
  for (int i = 0; i < kCodes; ++i) {
    if (threadIdx.x == i) store_shared(shared + 4 * i, __float_as_uint(values[i]));
  }
}

constexpr int kRunsPerChunk = kChunk / kWords;  // runs of 32 weights, which share a scale

// The scales of a chunk's runs, in rows whose blocks begin with a chunk: `load` sends for them, `decoded` waits.
struct ChunkScales {
  uint32_t raw[kRunsPerChunk];
  float nested_absmax, offset;

  // `weight` is the chunk's first one, counted in the flattened weight. What does not exist has scales of zero.
  __device__ __forceinline__ void load(const CudaQuantizedWeight& w, int64_t weight, int shift, bool exists) {
    nested_absmax = 0.f, offset = 0.f;
#pragma unroll
    for (int run = 0; run < kRunsPerChunk; ++run) raw[run] = 0;
    if (!exists) return;
    if (w.nested_code != nullptr) {
      nested_absmax = __ldg(w.nested_absmax + (weight >> shift >> kNestedShift)), offset = __ldg(w.offset);
#pragma unroll
      for (int run = 0; run < kRunsPerChunk; ++run) {
        raw[run] = __ldg(static_cast<const uint8_t*>(w.absmax) + ((weight + kWords * run) >> shift));
      }
    } else {
#pragma unroll
      for (int run = 0; run < kRunsPerChunk; ++run) {
        raw[run] = __float_as_uint(__ldg(static_cast<const float*>(w.absmax) + ((weight + kWords * run) >> shift)));
      }
    }
  }

  __device__ __forceinline__ uint4 decoded(const CudaQuantizedWeight& w) const {
    uint32_t scale[kRunsPerChunk];
#pragma unroll
    for (int run = 0; run < kRunsPerChunk; ++run) {
      scale[run] = w.nested_code == nullptr
                       ? raw[run]
                       : __float_as_uint(undo_nesting(__ldg(w.nested_code + raw[run]), nested_absmax, offset));
    }
    return {scale[0], scale[1], scale[2], scale[3]};
  }
};

}  // namespace lora_ops
