// gemm.cuh's kernel with a low-rank product of its own for every segment of rows (segments.h).
//
//     in the rows of segment i, out = in · weightᵀ + factor · drop'(scaling_i · left rightᵀ_i) + bias
//
// A tile is as in gemm.cuh, whatever segments its rows are in, so the weight is read as often as without adapters. Only the
// low-rank product is repeated, for every segment that a warp's rows meet, with rows of left outside of it as zero. So infinite
// or NaN elements of an adapter give NaN in other rows of that warp, too.
#pragma once

#include "gemm_launch.cuh"
#include "segments.cuh"

namespace lora_ops {

// The Gemm's right is null, and its rank that of the widest adapter.
template <bool kDropout>
struct SegmentedGemm : Plain<GemmOf<kDropout>> {
  static constexpr bool kBackward = kDropout;  // right is lora_A transposed, and left holds the scaling; else lora_B
  static constexpr bool kSparing = kDropout;   // beside the loop over segments
  Segments segments;
};

struct SegmentRows {
  int first, end;
  float scaling;
  __device__ __forceinline__ int existing(int row) const { return max(first, min(row, end - 1)); }
  __device__ __forceinline__ void weigh(float (&ranks)[4], int row) const {
    const bool inside = first <= row && row < end;
#pragma unroll
    for (int e = 0; e < 4; ++e) ranks[e] = inside ? scaling * ranks[e] : 0.f;
  }
};

template <class T, class TileT, bool kDropout>
__device__ __forceinline__ void add_low_rank(Accumulators<TileT>& acc, const SegmentedGemm<kDropout>& p, int row0,
                                             int column0) {
  const Segments& segments = p.segments;
  const int warp_row = row0 + Place<TileT>().warp_row;
  if (warp_row >= p.M) return;
  const auto warp_end = [&] { return min(recomputed(row0) + Place<TileT>().warp_row + TileT::kMmasM * kMmaM, p.M); };
  int segment = last_segment(segments, [&](int i) { return segments.first_row[i] <= warp_row; });
  int end = segments.first_row[segment];
#pragma unroll 1
  for (; segment < segments.count && end < warp_end(); ++segment) {
    const int first = end;
    end = segments.first_row[segment + 1];
    const SegmentAdapter adapter = segments.adapters[segment];
    if (first == end || adapter.rank == 0) continue;
    const SegmentRows rows{first, end, p.kBackward ? 1.f : adapter.scaling};
    const uintptr_t alignment = 4 * (p.right_f32 ? sizeof(float) : sizeof(T));
    Plain<Gemm> one{p};
    one.rank = adapter.rank;
    one.right = p.kBackward ? adapter.lora_A : adapter.lora_B;
    one.right_column_stride = p.kBackward ? 1 : adapter.rank;
    one.right_rank_stride = p.kBackward ? p.columns : 1;
    one.left_vector = p.left_vector && adapter.rank % 4 == 0;
    one.right_vector = !p.kBackward && adapter.rank % 4 == 0 && reinterpret_cast<uintptr_t>(one.right) % alignment == 0;
    if (p.right_f32) {
      multiply_low_rank<TileT, Bf16, float>(acc, one, rows, row0, column0);
    } else {
      multiply_low_rank<TileT, T, T>(acc, one, rows, row0, column0);
    }
  }
}

template <class T, class TileT, bool kWeightRows, bool kVector, bool kDropout>
__global__ void __launch_bounds__(kGemmThreads, 2) gemm_segments_kernel(const __grid_constant__ SegmentedGemm<kDropout> p) {
  gemm_tile<T, TileT, kWeightRows, kVector, kDropout>(p, kWeightRows && kVector && p.accumulate,
                                                      tile_of_block(p.tiles_m, p.tiles_n));
}

template <bool kDropout>
struct GemmSegmentsKernel {
  template <class T, class TileT, bool kWeightRows, bool kVector>
  static auto instance() {
    return gemm_segments_kernel<T, TileT, kWeightRows, kVector, kDropout>;
  }
};

template <bool kDropout>
void launch_segments(const DenseGemm& op, const Segments& segments, void* stream) {
  require(segments.count >= 1, op.name, "takes one segment or more", op.shapes);
  require(op.gemm.gate == nullptr && op.gemm.out_scale == nullptr, op.name, "takes neither a gate nor an output scale",
          op.shapes);
  SegmentedGemm<kDropout> p{{{op.gemm}}, segments};
  p.left_vector = aligned(p.left, p.left_stride, 4, DType::f32);
  launch_gemm<GemmSegmentsKernel<kDropout>>(op, p, p.columns, vectors(p), stream);
}

}  // namespace lora_ops
