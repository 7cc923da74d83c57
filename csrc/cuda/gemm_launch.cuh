// From an op's matrices to the instance of gemm.cuh's kernel that runs. Host code.
#pragma once

#include <algorithm>
#include <climits>

#include "check.h"
#include "gemm.cuh"

namespace lora_ops {

// GPUs that this is for have about as many multiprocessors: with fewer blocks, some of them have nothing to do.
constexpr int64_t kBlocksToFill = 100;

inline bool aligned(const void* data, int64_t stride, int elements, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % (elements * size_of(dtype)) == 0 && stride % elements == 0;
}

// Cuts out into tiles: the grid.
template <class TileT>
dim3 cut(const char* name, Gemm& p, const std::string& shapes) {
  const int64_t tiles_m = (static_cast<int64_t>(p.M) + TileT::kRows - 1) / TileT::kRows;
  const int64_t tiles_n = (static_cast<int64_t>(p.columns) + TileT::kColumns - 1) / TileT::kColumns;
  require(tiles_m * tiles_n <= INT_MAX && tiles_n <= INT_MAX / kGroup, name, "too many tiles", shapes);
  p.tiles_m = static_cast<int>(tiles_m);
  p.tiles_n = static_cast<int>(tiles_n);
  return dim3(static_cast<unsigned>(tiles_m * tiles_n));
}

inline Matrix transpose(const Matrix& m) {
  return {m.data, m.col_stride, m.row_stride, m.dtype};
}

template <class T, class TileT, bool kVector, bool kDropout>
void launch_tile(const char* name, Gemm p, bool weight_rows, void* stream, const std::string& shapes) {
  const dim3 grid = cut<TileT>(name, p, shapes);
  const auto kernel =
      weight_rows ? gemm_kernel<T, TileT, true, kVector, kDropout> : gemm_kernel<T, TileT, false, kVector, kDropout>;
  launch(name, kernel, grid, kGemmThreads, TileT::kSharedBytes, stream, p, shapes);
}

template <class T, bool kDropout>
void launch_typed(const char* name, const Gemm& p, DType dtype, bool weight_rows, GemmTile tile, void* stream,
                  const std::string& shapes) {
  if (p.weight != nullptr &&
      !(aligned(p.in, p.in_stride, kVectorElements, dtype) && aligned(p.weight, p.weight_stride, kVectorElements, dtype))) {
    return launch_tile<T, MediumTile, false, kDropout>(name, p, weight_rows, stream, shapes);
  }
  if (tile == GemmTile::automatic) {
    const int64_t large = (static_cast<int64_t>(p.M) + LargeTile::kRows - 1) / LargeTile::kRows *
                          ((static_cast<int64_t>(p.columns) + LargeTile::kColumns - 1) / LargeTile::kColumns);
    tile = p.M <= SmallTile::kRows ? GemmTile::small : large < kBlocksToFill ? GemmTile::medium : GemmTile::large;
  }
  switch (tile) {
    case GemmTile::small:
      return launch_tile<T, SmallTile, true, kDropout>(name, p, weight_rows, stream, shapes);
    case GemmTile::medium:
      return launch_tile<T, MediumTile, true, kDropout>(name, p, weight_rows, stream, shapes);
    default:
      return launch_tile<T, LargeTile, true, kDropout>(name, p, weight_rows, stream, shapes);
  }
}

// What is said of every product: out (M, columns) = in (M, depth) · weightᵀ + factor · drop'(left rightᵀ) + bias, with right
// (columns, rank) a view whose strides are any. The weight is the caller's to fill in.
inline Gemm describe(const char* name, int64_t M, int64_t columns, int64_t depth, int64_t rank, const Matrix& in,
                     const float* left, const Matrix& right, float factor, const Matrix& bias, const DeviceDropout& dropout,
                     const Matrix& out, const std::string& sizes) {
  require(std::max({M, columns, depth, rank}) <= INT_MAX / 2, name, "a size is beyond 2^30", sizes);
  require(out.dtype != DType::f32 && (in.data == nullptr || in.dtype == out.dtype), name, "takes bf16 or fp16, and one of them",
          sizes);
  require(right.dtype == DType::f32 || right.dtype == out.dtype, name, "adapters are fp32 or of the input's type", sizes);
  require((in.data == nullptr || in.col_stride == 1) && out.col_stride == 1, name, "rows are contiguous", sizes);
  Gemm p{};
  p.M = static_cast<int>(M);
  p.columns = static_cast<int>(columns);
  p.depth = static_cast<int>(depth);
  p.rank = static_cast<int>(rank);
  p.in = static_cast<const uint16_t*>(in.data);
  p.in_stride = in.row_stride;
  p.left = left;
  p.left_vector = aligned(left, rank, 4, DType::f32);
  p.right = right.data;
  p.right_f32 = right.dtype == DType::f32;
  p.right_column_stride = right.row_stride;
  p.right_rank_stride = right.col_stride;
  p.right_vector = right.col_stride == 1 && rank % 4 == 0 && aligned(right.data, right.row_stride, 4, right.dtype);
  p.factor = factor;
  p.bias = bias.data;
  p.bias_f32 = bias.dtype == DType::f32;
  p.dropout = dropout;
  p.out = static_cast<uint16_t*>(out.data);
  p.out_stride = out.row_stride;
  p.out_vector = aligned(out.data, out.row_stride, kVectorElements, out.dtype);
  return p;
}

// With a dense weight (columns, depth), a view: one of its strides is 1. A null weight: out += the rest.
template <bool kDropout>
void launch_gemm(const char* name, int64_t M, int64_t columns, int64_t depth, int64_t rank, const Matrix& in,
                 const Matrix& weight, const float* left, const Matrix& right, float factor, const Matrix& bias,
                 const DeviceDropout& dropout, const Matrix& out, GemmTile tile, void* stream) {
  const std::string sizes = shapes("M", M, "columns", columns, "depth", depth, "r", rank);
  require(weight.data == nullptr || weight.dtype == out.dtype, name, "takes bf16 or fp16, and one of them", sizes);
  require(weight.col_stride == 1 || weight.row_stride == 1, name, "the weight's rows or columns are contiguous", sizes);
  Gemm p = describe(name, M, columns, depth, rank, in, left, right, factor, bias, dropout, out, sizes);
  const bool weight_rows = weight.col_stride == 1;
  p.weight = static_cast<const uint16_t*>(weight.data);
  p.weight_stride = weight_rows ? weight.row_stride : weight.col_stride;
  p.accumulate = weight.data == nullptr;
  if (out.dtype == DType::bf16) {
    launch_typed<Bf16, kDropout>(name, p, out.dtype, weight_rows, tile, stream, sizes);
  } else {
    launch_typed<Half, kDropout>(name, p, out.dtype, weight_rows, tile, stream, sizes);
  }
}

}  // namespace lora_ops
