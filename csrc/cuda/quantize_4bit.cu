// absmax[b] = max |weight| of block b, code = the nearest to weight / absmax: bit for bit what the CPU's quantize gives.
//
// Two kernels. Blocks of scales run across rows, so the first goes over the flattened weight, a warp to a block. The second
// goes row by row, sixteen threads to a chunk of 128 codes (../nf4.h): a thread encodes the pairs of neighbours at 32 j + 2 d,
// which are words 2 d and 2 d + 1 of its chunk, and stores them as one dword; half of one in a row's short tail.
#include "quantize_4bit.h"

#include <algorithm>

#include "weight_4bit.cuh"

namespace lora_ops {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kPairs = kChunkBytes / 4, kChunksOfRow = kThreads / kPairs;

struct Args {
  CudaQuantize4Bit p;
  int shift;            // of the block size
  int64_t blocks;       // of scales
  unsigned row_blocks;  // blocks of threads per row
};

template <class T>
__global__ void __launch_bounds__(kThreads) absmax_kernel(const __grid_constant__ Args args) {
  const CudaQuantize4Bit& p = args.p;
  const int64_t block = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (block >= args.blocks) return;
  const int64_t first = block << args.shift, size = p.N * p.K;
  const bool whole = first + p.blocksize <= size;
  const int64_t end = whole ? first + p.blocksize : size;
  int largest = 0;  // as integers, magnitudes compare as they do as numbers, and NaN is the largest
  for (int64_t i = first + lane_id(); i < end; i += kWarp) {
    largest = max(largest, __float_as_int(to_float(static_cast<const T*>(p.weight)[i])) & 0x7fffffff);
  }
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, lanes));
  // bitsandbytes never leaves the last block's scale at zero where it is not a whole one.
  if (!whole) largest = max(largest, __float_as_int(kSmallestAbsmax));
  if (lane_id() == 0) p.absmax[block] = __int_as_float(largest);
}

template <class T, QuantType kType>
__device__ __forceinline__ uint32_t encode(const Args& args, int64_t at) {
  constexpr Encoder kEncoder{kType == QuantType::nf4 ? kNf4 : kFp4};
  const int64_t block = at >> args.shift;
  const float weight = to_float(static_cast<const T*>(args.p.weight)[at]);
  const float largest = __int_as_float(max(__float_as_int(args.p.absmax[block]), __float_as_int(kSmallestAbsmax)));
  const bool whole = (block + 1) << args.shift <= args.p.N * args.p.K;  // bitsandbytes divides where it is not
  return kEncoder(whole ? __fmul_rn(weight, __fdiv_rn(1.f, largest)) : __fdiv_rn(weight, largest));
}

template <class T, QuantType kType>
__global__ void __launch_bounds__(kThreads) encode_kernel(const __grid_constant__ Args args) {
  const CudaQuantize4Bit& p = args.p;
  const int64_t row = blockIdx.x / args.row_blocks;
  const int64_t chunk = int64_t{blockIdx.x % args.row_blocks} * kChunksOfRow + threadIdx.x / kPairs;
  const int d = threadIdx.x % kPairs;
  const int64_t left = p.K - chunk * kChunk;
  if (left <= 0) return;
  uint32_t words = 0;
#pragma unroll
  for (int j = 0; j < kRunsPerChunk; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int i = kWords * j + 2 * d + e;
      const uint32_t code =
          i < left ? encode<T, kType>(args, row * p.K + chunk * kChunk + i) : (kType == QuantType::nf4 ? kNf4 : kFp4).zero;
      words |= code << (16 * e + 4 * j);
    }
  }
  uint8_t* bytes = p.codes + row * row_bytes(p.K) + chunk * kChunkBytes;
  if (stored_weights(left) == kChunk) {
    reinterpret_cast<uint32_t*>(bytes)[d] = words;
  } else {
    reinterpret_cast<uint16_t*>(bytes)[d] = static_cast<uint16_t>(words & 0xff | words >> 8 & 0xff00);
  }
}

template <class T>
void launch_typed(const Args& args, void* stream, const std::string& sizes) {
  const int64_t scale_grid = (args.blocks + kWarps - 1) / kWarps, code_grid = args.p.N * args.row_blocks;
  require(std::max(scale_grid, code_grid) <= INT32_MAX, "quantize_4bit", "too many weights", sizes);
  launch("quantize_4bit", absmax_kernel<T>, dim3(static_cast<unsigned>(scale_grid)), kThreads, 0, stream, args, sizes);
  const auto kernel = args.p.quant_type == QuantType::nf4 ? encode_kernel<T, QuantType::nf4> : encode_kernel<T, QuantType::fp4>;
  launch("quantize_4bit", kernel, dim3(static_cast<unsigned>(code_grid)), kThreads, 0, stream, args, sizes);
}

}  // namespace

void launch_quantize_4bit(const CudaQuantize4Bit& p, void* stream) {
  const std::string sizes = shapes("N", p.N, "K", p.K, "blocksize", p.blocksize);
  constexpr int64_t kWeightsOfBlock = int64_t{kChunk} * kChunksOfRow;
  const int shift = shift_of("quantize_4bit", p.blocksize, sizes);
  const auto row_blocks = static_cast<unsigned>((p.K + kWeightsOfBlock - 1) / kWeightsOfBlock);
  const Args args{p, shift, (p.N * p.K + p.blocksize - 1) >> shift, row_blocks};
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

int lora_ops_quantize_4bit(const lora_ops::CudaQuantize4Bit* params, void* stream) {
  return lora_ops::report_errors([&] { lora_ops::launch_quantize_4bit(*params, stream); });
}
