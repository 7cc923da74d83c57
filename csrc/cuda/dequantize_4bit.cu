// weight (N, K) = values[code] · absmax, in fp32, rounded once: bit for bit what the CPU's dequantize gives.
//
// A block of 128 threads takes eight chunks of 128 weights of a row, sixteen threads a chunk. A thread's dword holds words 2 d
// and 2 d + 1 of its chunk, so nibble j of the two is a pair of neighbours at 32 j + 2 d: each of four stores of a pair is next
// to its neighbour thread's. A short tail's bytes are widened to words, of which only the first two nibbles are weights.
#include "dequantize_4bit.h"

#include <utility>

#include "check.h"
#include "tile.cuh"

namespace lora_ops {
namespace {

constexpr int kThreads = 128, kThreadsPerChunk = kChunkBytes / 4, kChunksPerBlock = kThreads / kThreadsPerChunk;
constexpr int kNestedShift = 8;  // 256 scales under one nested_absmax

struct Args {
  CudaDequantize4Bit p;
  int shift;           // of the block size
  int64_t row_blocks;  // blocks of threads per row
};

__device__ __forceinline__ float scale_of(const CudaDequantize4Bit& p, int64_t block) {
  if (p.nested_code == nullptr) return static_cast<const float*>(p.absmax)[block];
  const float nested = p.nested_code[static_cast<const uint8_t*>(p.absmax)[block]];
  return __fadd_rn(__fmul_rn(nested, p.nested_absmax[block >> kNestedShift]), *p.offset);
}

template <class T>
__device__ __forceinline__ void store_pair(T* to, float first, float second, bool both) {
  if constexpr (sizeof(T) == 2) {
    if (both && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
      *reinterpret_cast<uint32_t*>(to) = T::pair(first, second);
      return;
    }
  }
  to[0] = from_float<T>(first);
  if (both) to[1] = from_float<T>(second);
}

template <QuantType kType, int kCode>
constexpr float kValue = (kType == QuantType::nf4 ? kNf4 : kFp4).values[kCode];

// A thread per value: constants in the instructions, since a constant table indexed by a variable would lie in local memory.
template <QuantType kType, int... kCode>
__device__ __forceinline__ void fill(float* values, std::integer_sequence<int, kCode...>) {
  ((threadIdx.x == kCode ? static_cast<void>(values[kCode] = kValue<kType, kCode>) : void()), ...);
}

template <class T, QuantType kType>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const __grid_constant__ Args args) {
  const CudaDequantize4Bit& p = args.p;
  float* values = reinterpret_cast<float*>(shared_memory());
  fill<kType>(values, std::make_integer_sequence<int, kCodes>());
  __syncthreads();

  const int64_t row = blockIdx.x / args.row_blocks;
  const int64_t chunk = blockIdx.x % args.row_blocks * kChunksPerBlock + threadIdx.x / kThreadsPerChunk;
  const int d = threadIdx.x % kThreadsPerChunk;
  const int64_t left = p.K - chunk * kChunk;
  if (left <= 0) return;
  const uint8_t* bytes = p.codes + row * row_bytes(p.K) + chunk * kChunkBytes;
  const bool whole = stored_weights(left) == kChunk;
  const uint32_t words = whole ? *reinterpret_cast<const uint32_t*>(bytes + 4 * d) : bytes[2 * d] | bytes[2 * d + 1] << 16;
#pragma unroll
  for (int j = 0; j < kChunk / kWords; ++j) {
    const int i = kWords * j + 2 * d;
    if (i >= left) break;
    const int64_t at = row * p.K + chunk * kChunk + i;
    const bool both = i + 1 < left;
    const float first_scale = scale_of(p, at >> args.shift);
    const float second_scale =
        (at + 1) >> args.shift == at >> args.shift || !both ? first_scale : scale_of(p, (at + 1) >> args.shift);
    const float first = __fmul_rn(values[words >> 4 * j & 15], first_scale);
    const float second = __fmul_rn(values[words >> (16 + 4 * j) & 15], second_scale);
    store_pair(static_cast<T*>(p.weight) + at, first, second, both);
  }
}

template <class T>
void launch_typed(const Args& args, unsigned grid, void* stream, const std::string& sizes) {
  const auto kernel =
      args.p.quant_type == QuantType::nf4 ? dequantize_kernel<T, QuantType::nf4> : dequantize_kernel<T, QuantType::fp4>;
  launch("dequantize_4bit", kernel, dim3(grid), kThreads, kCodes * sizeof(float), stream, args, sizes);
}

}  // namespace

void launch_dequantize_4bit(const CudaDequantize4Bit& p, void* stream) {
  const std::string sizes = shapes("N", p.N, "K", p.K, "blocksize", p.blocksize);
  require(p.blocksize >= 32 && (p.blocksize & (p.blocksize - 1)) == 0, "dequantize_4bit",
          "the block size is a power of two from 32", sizes);
  Args args{p, 0, 0};
  while (p.blocksize >> args.shift > 1) ++args.shift;
  constexpr int64_t kWeightsPerBlock = int64_t{kChunk} * kChunksPerBlock;
  args.row_blocks = (p.K + kWeightsPerBlock - 1) / kWeightsPerBlock;
  require(p.N * args.row_blocks <= 0x7fffffff, "dequantize_4bit", "too many rows", sizes);
  const auto grid = static_cast<unsigned>(p.N * args.row_blocks);
  switch (p.dtype) {
    case DType::f32:
      return launch_typed<float>(args, grid, stream, sizes);
    case DType::bf16:
      return launch_typed<Bf16>(args, grid, stream, sizes);
    case DType::f16:
      return launch_typed<Half>(args, grid, stream, sizes);
  }
}

}  // namespace lora_ops
