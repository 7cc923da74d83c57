// From an op's matrices and 4-bit weight to the instance of gemm_4bit.cuh's kernel that runs. Host code.
#pragma once

#include "gemm_4bit.cuh"
#include "gemm_launch.cuh"

namespace lora_ops {

template <class T, class TileT, bool kDropout>
void launch_tile_4bit(const char* name, Gemm4Bit<kDropout> p, void* stream, const std::string& shapes) {
  const dim3 grid = cut<TileT>(name, p.gemm, shapes);
  launch(name, gemm_4bit_kernel<T, TileT, kDropout>, grid, kGemmThreads, TileT::kSharedBytes, stream, p, shapes);
}

// gemm has everything but the weight (N, K), which is its columns x depth in the forward and depth x columns in dx.
template <bool kDropout>
Gemm4Bit<kDropout> with_weight(const char* name, const Gemm& gemm, const Matrix& in, const CudaQuantizedWeight& weight,
                               int64_t K, const std::string& shapes) {
  require(K % kChunk == 0, name, "K is a multiple of 128", shapes);
  require(reinterpret_cast<uintptr_t>(weight.codes) % kVectorBytes == 0, name, "codes begin at a multiple of 16 bytes", shapes);
  require(aligned(in.data, in.row_stride, kVectorElements, in.dtype), name, "rows begin at multiples of 16 bytes", shapes);
  Gemm4Bit<kDropout> p{{{gemm}}, weight, K, shift_of(name, weight.blocksize, shapes), {}};
  std::copy_n(code_table(weight.quant_type).values, kCodes, p.values);
  return p;
}

}  // namespace lora_ops
