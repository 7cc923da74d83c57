// weight (N, K) = values[code] · absmax, in fp32, rounded once: bit for bit what the CPU's dequantize gives.
//
// Where rows are whole chunks of 128 weights, all chunks lie one after the other, and so do the weights. Four threads take a
// chunk: 16 bytes of codes are words 8 q ... 8 q + 7, whose nibbles j are eight neighbours, 32 j + 8 q ..., under one scale.
//
// Other shapes go row by row, sixteen threads to a chunk. A thread's dword holds words 2 d and 2 d + 1, so nibble j of the two
// is a pair of neighbours at 32 j + 2 d. A short tail's bytes are widened to words, of which only the first two nibbles are
// weights.
#include "dequantize_4bit.h"

#include <algorithm>

#include "weight_4bit.cuh"

namespace lora_ops {
namespace {

constexpr int kThreads = 128;
constexpr int kPieces = kChunkBytes / kVectorBytes;                        // threads per whole chunk
constexpr int kPairs = kChunkBytes / 4, kChunksOfRow = kThreads / kPairs;  // threads per chunk; chunks per block
constexpr int kNibbles = kRunsPerChunk;                                    // of a word

struct Args {
  CudaDequantize4Bit p;
  int shift;            // of the block size
  unsigned row_blocks;  // blocks of threads per row
  float values[kCodes];
};

__device__ __forceinline__ uint32_t values_table() {
  return shared_address(shared_memory());
}

// The weight of the code in the lowest bits.
__device__ __forceinline__ float weight_of(uint32_t code, float scale) {
  return __fmul_rn(lookup_shared(values_table() + (code & kCodes - 1) * 4), scale);
}

template <class T>
__device__ __forceinline__ void store8(T* to, const float (&v)[8]) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint4*>(to) = {T::pair(v[0], v[1]), T::pair(v[2], v[3]), T::pair(v[4], v[5]), T::pair(v[6], v[7])};
  } else {
    reinterpret_cast<float4*>(to)[0] = {v[0], v[1], v[2], v[3]};
    reinterpret_cast<float4*>(to)[1] = {v[4], v[5], v[6], v[7]};
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_chunks_kernel(const __grid_constant__ Args args) {
  const CudaDequantize4Bit& p = args.p;
  store_values(values_table(), args.values);
  __syncthreads();
  const int64_t piece = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (piece * 2 * kVectorBytes >= p.N * p.K) return;
  const uint4 codes = load_streaming(reinterpret_cast<const uint4*>(p.weight.codes) + piece);
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int j = 0; j < kNibbles; ++j) {
    const int64_t at = piece / kPieces * kChunk + kWords * j + piece % kPieces * kVectorElements;
    const float scale = scale_of(p.weight, at >> args.shift);
    float weights[kVectorElements];
#pragma unroll
    for (int e = 0; e < kVectorElements; ++e) weights[e] = weight_of(words[e / 2] >> (e % 2 * 16 + 4 * j), scale);
    store8(static_cast<T*>(p.out) + at, weights);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_rows_kernel(const __grid_constant__ Args args) {
  const CudaDequantize4Bit& p = args.p;
  store_values(values_table(), args.values);
  __syncthreads();
  const int64_t row = blockIdx.x / args.row_blocks;
  const int64_t chunk = int64_t{blockIdx.x % args.row_blocks} * kChunksOfRow + threadIdx.x / kPairs;
  const int d = threadIdx.x % kPairs;
  const int64_t left = p.K - chunk * kChunk;
  if (left <= 0) return;
  const uint8_t* bytes = p.weight.codes + row * row_bytes(p.K) + chunk * kChunkBytes;
  const bool whole = stored_weights(left) == kChunk;
  const uint32_t words = whole ? *reinterpret_cast<const uint32_t*>(bytes + 4 * d) : bytes[2 * d] | bytes[2 * d + 1] << 16;
#pragma unroll
  for (int j = 0; j < kNibbles; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int i = kWords * j + 2 * d + e;
      if (i >= left) return;
      const int64_t at = row * p.K + chunk * kChunk + i;
      const float weight = weight_of(words >> (e * 16 + 4 * j), scale_of(p.weight, at >> args.shift));
      static_cast<T*>(p.out)[at] = from_float<T>(weight);
    }
  }
}

template <class T>
void launch_typed(const Args& args, void* stream, const std::string& sizes) {
  const CudaDequantize4Bit& p = args.p;
  const bool chunks = p.K % kChunk == 0 && reinterpret_cast<uintptr_t>(p.weight.codes) % kVectorBytes == 0 &&
                      reinterpret_cast<uintptr_t>(p.out) % kVectorBytes == 0;
  constexpr int64_t kWeightsOfBlock = int64_t{kThreads} * 2 * kVectorBytes;
  const int64_t grid = chunks ? (p.N * p.K + kWeightsOfBlock - 1) / kWeightsOfBlock : p.N * args.row_blocks;
  require(grid <= INT32_MAX, "dequantize_4bit", "too many weights", sizes);
  launch("dequantize_4bit", chunks ? dequantize_chunks_kernel<T> : dequantize_rows_kernel<T>, dim3(static_cast<unsigned>(grid)),
         kThreads, sizeof args.values, stream, args, sizes);
}

}  // namespace

void launch_dequantize_4bit(const CudaDequantize4Bit& p, void* stream) {
  const std::string sizes = shapes("N", p.N, "K", p.K, "blocksize", p.weight.blocksize);
  constexpr int64_t kWeightsOfBlock = int64_t{kChunk} * kChunksOfRow;
  const auto row_blocks = static_cast<unsigned>((p.K + kWeightsOfBlock - 1) / kWeightsOfBlock);
  Args args{p, shift_of("dequantize_4bit", p.weight.blocksize, sizes), row_blocks, {}};
  std::copy_n(code_table(p.weight.quant_type).values, kCodes, args.values);
  switch (p.dtype) {
    case DType::f32:
      return launch_typed<float>(args, stream, sizes);
    case DType::bf16:
      return launch_typed<Bf16>(args, stream, sizes);
    case DType::f16:
      return launch_typed<Half>(args, stream, sizes);
  }
}

}  // namespace lora_ops

int lora_ops_dequantize_4bit(const lora_ops::CudaDequantize4Bit* params, void* stream) {
  return lora_ops::report_errors([&] { lora_ops::launch_dequantize_4bit(*params, stream); });
}
