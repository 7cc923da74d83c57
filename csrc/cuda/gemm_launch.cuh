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

inline int64_t tiles_of(int64_t size, int tile) {
  return (size + tile - 1) / tile;
}

// The grid of a kernel whose parameters hold how many tiles there are.
template <class P>
dim3 cut(const char* name, P& p, int64_t tiles_m, int64_t tiles_n, const std::string& shapes) {
  require(tiles_m * tiles_n <= INT_MAX && tiles_n <= INT_MAX / kGroup, name, "too many tiles", shapes);
  p.tiles_m = static_cast<int>(tiles_m);
  p.tiles_n = static_cast<int>(tiles_n);
  return dim3(static_cast<unsigned>(tiles_m * tiles_n));
}
template <class TileT>
dim3 cut(const char* name, Gemm& p, const std::string& shapes) {
  return cut(name, p, tiles_of(p.M, TileT::kRows), tiles_of(p.columns, TileT::kColumns), shapes);
}

inline Matrix transpose(const Matrix& m) {
  return {m.data, m.col_stride, m.row_stride, m.dtype};
}

// A product as launchers have it: what its kernel takes, and what picks the instance.
struct DenseGemm {
  const char* name;
  std::string shapes;
  Gemm gemm;
  DType dtype;
  bool weight_rows;
  GemmTile tile;
};

inline bool vectors(const Gemm& p) {
  return p.accumulate || (aligned(p.in, p.in_stride, kVectorElements, DType::bf16) &&
                          aligned(p.weight, p.weight_stride, kVectorElements, DType::bf16));
}

// Kernel::instance<T, TileT, kWeightRows, kVector>() is the kernel, and P what it takes.
template <bool kDropout>
struct GemmKernel {
  using Params = GemmOf<kDropout>;
  template <class T, class TileT, bool kWeightRows, bool kVector>
  static auto instance() {
    return gemm_kernel<T, TileT, kWeightRows, kVector, kDropout>;
  }
};

template <class Kernel, class T, class TileT, bool kVector, class P>
void launch_tile(const DenseGemm& op, P p, void* stream) {
  const dim3 grid = cut<TileT>(op.name, p, op.shapes);
  const auto kernel = op.weight_rows ? Kernel::template instance<T, TileT, true, kVector>()
                                     : Kernel::template instance<T, TileT, false, kVector>();
  launch(op.name, kernel, grid, kGemmThreads, TileT::kSharedBytes, stream, p, op.shapes);
}

template <class Kernel, class T, class P>
void launch_typed(const DenseGemm& op, const P& p, int64_t columns, bool vector, void* stream) {
  if (!vector) return launch_tile<Kernel, T, MediumTile, false>(op, p, stream);
  GemmTile tile = op.tile;
  if (tile == GemmTile::automatic) {
    const int64_t M = op.gemm.M, large = tiles_of(M, LargeTile::kRows) * tiles_of(columns, LargeTile::kColumns);
    tile = M <= SmallTile::kRows ? GemmTile::small : large < kBlocksToFill ? GemmTile::medium : GemmTile::large;
  }
  switch (tile) {
    case GemmTile::small:
      return launch_tile<Kernel, T, SmallTile, true>(op, p, stream);
    case GemmTile::medium:
      return launch_tile<Kernel, T, MediumTile, true>(op, p, stream);
    default:
      return launch_tile<Kernel, T, LargeTile, true>(op, p, stream);
  }
}

// `columns` of out altogether; `vector`: every row of every dense operand begins at a multiple of 16 bytes.
template <class Kernel, class P>
void launch_gemm(const DenseGemm& op, const P& p, int64_t columns, bool vector, void* stream) {
  if (op.dtype == DType::bf16) {
    launch_typed<Kernel, Bf16>(op, p, columns, vector, stream);
  } else {
    launch_typed<Kernel, Half>(op, p, columns, vector, stream);
  }
}
template <class Kernel>
void launch_gemm(const DenseGemm& op, void* stream) {
  launch_gemm<Kernel>(op, typename Kernel::Params{op.gemm}, op.gemm.columns, vectors(op.gemm), stream);
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
  p.left_stride = rank;
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

// left's rows left_stride elements apart (0: rank) instead, and gated by a gate (rank), or (M, rank) with a stride.
inline void set_left(Gemm& p, int64_t left_stride, const float* gate, int64_t gate_stride) {
  if (left_stride != 0) p.left_stride = left_stride;
  p.left_vector = p.rank % 4 == 0 && aligned(p.left, p.left_stride, 4, DType::f32);
  p.gate = gate;
  p.gate_stride = gate_stride;
}

// The weight (columns, depth), a view: one of its strides is 1. Where it is null: out += the rest.
inline void set_weight(DenseGemm& op, const Matrix& weight) {
  require(weight.data == nullptr || weight.dtype == op.dtype, op.name, "takes bf16 or fp16, and one of them", op.shapes);
  require(weight.col_stride == 1 || weight.row_stride == 1, op.name, "the weight's rows or columns are contiguous", op.shapes);
  op.weight_rows = weight.data == nullptr || weight.col_stride == 1;
  op.gemm.weight = static_cast<const uint16_t*>(weight.data);
  op.gemm.weight_stride = op.weight_rows ? weight.row_stride : weight.col_stride;
  op.gemm.accumulate = weight.data == nullptr;
}

}  // namespace lora_ops
