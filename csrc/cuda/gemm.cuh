// What lora_forward.cu and lora_backward_dx.cu share: one product of a dense matrix and a weight, plus a low-rank product.
//
//     out (M, columns) = in (M, depth) · weightᵀ + factor · drop'(left rightᵀ) + bias        forward: x, W0, S, B
//                                                                                           dx:      dy, W0ᵀ, dS, Aᵀ
//
// where left may be gated, left ∘ gate, as it is loaded, and the sum scaled, out_scale ∘ (...) + bias, as it is stored.
//
// A block of four warps owns a tile of out, kept in fp32 accumulators from its first to its last summand, and rounds it once.
//
// The low-rank term comes first. It alone is scaled and masked, which in the accumulators costs no tile of its own, and its
// operands go from global memory straight into fragments: a few ranks deep, they are not worth a trip through shared memory,
// and their latency hides behind the first copies of the main product, which are under way meanwhile.
//
// The main product then runs over depth in steps of kDepth, through a ring of kStages buffers filled by cp.async: while step i
// is multiplied, the copies of steps i + 1 ... i + kStages - 1 are under way. Fragments are loaded one mma's depth (16) ahead,
// across the border of two steps too, so that tensor cores do not wait for shared memory. What lies beyond depth is copied as
// zeros, what lies beyond M or columns is never stored; so the loop has no branch.
//
// The weight is (columns, depth) in memory, or (depth, columns), which ldmatrix transposes on the way: forward and dx of a
// weight and of a transposed view come down to these two.
//
// A warp's columns are 8 or 16 of every 32 of the tile: one Philox call gives bits of columns 32 apart, all of one warp.
//
// Budget of Tile 128 x 128 x 32: 3 x 16 KiB of shared memory and at most 255 registers let two blocks run on every
// architecture; per step and warp 64 mma, 16 ldmatrix, 8 cp.async.
#pragma once

#include "low_rank.cuh"

namespace lora_ops {

// --- main product -----------------------------------------------------------------------------------------------------

// How many of a chunk's elements exist where `left` do.
__device__ __forceinline__ int in_chunk(int left) {
  return max(0, min(left, kVectorElements));
}

// One chunk, of which `count` (0 ... 8) elements exist.
template <bool kVector>
__device__ __forceinline__ void copy_chunk(uint32_t shared, const uint16_t* global, int count) {
  if constexpr (kVector) {
    cp_async16(shared, global, 2 * count);
  } else {
    uint32_t pairs[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t first = 2 * e < count ? global[2 * e] : 0u, second = 2 * e + 1 < count ? global[2 * e + 1] : 0u;
      pairs[e] = first | second << 16;
    }
    store_shared(shared, uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
  }
}

// Copies tiles [row][depth] of a matrix (rows, depth), one step after the other. Rows beyond the last repeat it.
template <int kRows, int kDepth, bool kVector>
struct RowCopies {
  static constexpr int kRowBytes = kDepth * 2, kChunks = kDepth / kVectorElements, kPassRows = kGemmThreads / kChunks;
  static constexpr int kPasses = kRows / kPassRows;
  static_assert(kPassRows % 8 == 0, "a pass below, the swizzle is the same");
  const uint16_t* from[kPasses];
  uint32_t to;
  int left;  // of depth

  __device__ RowCopies(const uint16_t* matrix, int64_t stride, int row0, int rows, int depth) {
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      from[i] = matrix + min(row0 + row + i * kPassRows, rows - 1) * stride + chunk * kVectorElements;
    }
    to = swizzle<kRowBytes>(row, chunk);
    left = depth - chunk * kVectorElements;
  }
  __device__ void start(uint32_t shared) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      copy_chunk<kVector>(shared + to + i * kPassRows * kRowBytes, from[i], in_chunk(left));
      from[i] += kDepth;
    }
    left -= kDepth;
  }
};

// Copies tiles [depth][column] of a matrix (depth, columns).
template <int kColumns, int kDepth, bool kVector>
struct ColumnCopies {
  static constexpr int kRowBytes = kColumns * 2, kChunks = kColumns / kVectorElements, kPassRows = kGemmThreads / kChunks;
  static constexpr int kPasses = kDepth / kPassRows;
  static_assert(kPassRows % 8 == 0, "a pass below, the swizzle is the same");
  const uint16_t* from;
  int64_t pass;  // elements
  uint32_t to;
  int count, left;  // elements of the chunk; of depth

  __device__ ColumnCopies(const uint16_t* matrix, int64_t stride, int column0, int columns, int depth) {
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    from = matrix + row * stride + column0 + chunk * kVectorElements;
    pass = kPassRows * stride;
    to = swizzle<kRowBytes>(row, chunk);
    count = in_chunk(columns - column0 - chunk * kVectorElements);
    left = depth - row;
  }
  __device__ void start(uint32_t shared) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      copy_chunk<kVector>(shared + to + i * kPassRows * kRowBytes, from, i * kPassRows < left ? count : 0);
      from += pass;
    }
    left -= kDepth;
  }
};

// Loads the fragments of `in` of one mma's depth, `k` of kMmasK, from a stage.
template <class TileT>
struct InFragments {
  static constexpr int kRowBytes = TileT::kDepth * 2;
  uint32_t offset[TileT::kMmasK];

  __device__ InFragments() {
    const Place<TileT> place;
    const LaneChunk a = rows_first(place.lane);
#pragma unroll
    for (int k = 0; k < TileT::kMmasK; ++k) offset[k] = swizzle<kRowBytes>(place.warp_row + a.row, 2 * k + a.chunk);
  }
  __device__ void load(uint32_t (&a)[TileT::kMmasM][4], uint32_t stage, int k) const {
#pragma unroll
    for (int i = 0; i < TileT::kMmasM; ++i) ldmatrix_x4<false>(a[i], stage + offset[k] + i * kMmaM * kRowBytes);
  }
};

// And those of the weight.
template <class TileT, bool kWeightRows>
struct WeightFragments {
  static constexpr int kRowBytes = 2 * (kWeightRows ? TileT::kDepth : TileT::kColumns);
  static constexpr int kPairs = TileT::kMmasN / 2;
  static constexpr int kOffsets = kWeightRows ? TileT::kMmasK : kPairs;
  uint32_t offset[kOffsets];

  __device__ WeightFragments() {
    const Place<TileT> place;
    const LaneChunk rows = rows_first(place.lane), chunks = chunks_first(place.lane);
#pragma unroll
    for (int i = 0; i < kOffsets; ++i) {
      if constexpr (kWeightRows) {
        const int column = place.warp_column + TileT::column(chunks.row / kMmaN) + chunks.row % kMmaN;
        offset[i] = TileT::kInBytes + swizzle<kRowBytes>(column, 2 * i + chunks.chunk);
      } else {
        const int column = place.warp_column + TileT::column(2 * i) + TileT::column(rows.chunk);
        offset[i] = TileT::kInBytes + swizzle<kRowBytes>(rows.row, column / kVectorElements);
      }
    }
  }
  __device__ void load(uint32_t (&b)[kPairs][4], uint32_t stage, int k) const {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      if constexpr (kWeightRows) {
        ldmatrix_x4<false>(b[p], stage + offset[k] + TileT::column(2 * p) * kRowBytes);
      } else {
        ldmatrix_x4<true>(b[p], stage + offset[p] + k * kMmaK * kRowBytes);
      }
    }
  }
};

template <class T, class TileT>
__device__ __forceinline__ void multiply(Accumulators<TileT>& acc, const uint32_t (&a)[TileT::kMmasM][4],
                                         const uint32_t (&b)[TileT::kMmasN / 2][4]) {
#pragma unroll
  for (int i = 0; i < TileT::kMmasM; ++i) {
#pragma unroll
    for (int j = 0; j < TileT::kMmasN; ++j) T::mma(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }
}

// --- out --------------------------------------------------------------------------------------------------------------

// Of a vector (columns) in fp32 or T, if there is one.
template <class T>
__device__ __forceinline__ float at_column(const void* vector, bool f32, int columns, int column, float otherwise) {
  if (vector == nullptr || column >= columns) return otherwise;
  return f32 ? static_cast<const float*>(vector)[column] : to_float(static_cast<const T*>(vector)[column]);
}

// This thread's chunks of a tile of out: where they are in global memory, and in shared memory.
template <class TileT>
struct OutChunks {
  static constexpr int kRowBytes = TileT::kColumns * 2, kChunks = TileT::kColumns / kVectorElements;
  static constexpr int kPassRows = kGemmThreads / kChunks;
  uint16_t* out;
  uint32_t at;
  int row, left;  // of columns, from the chunk's first on

  template <class P>
  __device__ OutChunks(const P& p, uint32_t shared, int row0, int column0) {
    const int chunk = threadIdx.x % kChunks;
    row = row0 + threadIdx.x / kChunks;
    out = p.out + row * p.out_stride + column0 + chunk * kVectorElements;
    at = shared + swizzle<kRowBytes>(threadIdx.x / kChunks, chunk);
    left = p.columns - column0 - chunk * kVectorElements;
  }
};

// Begins to bring what out holds into shared memory.
template <class TileT, class P>
__device__ __forceinline__ void start_out(const P& p, uint32_t shared, int row0, int column0) {
  using Chunks = OutChunks<TileT>;
  const Chunks chunks(p, shared, row0, column0);
  const int count = in_chunk(chunks.left);
#pragma unroll 4
  for (int i = 0; i < TileT::kRows; i += Chunks::kPassRows) {
    const int existing = chunks.row + i < p.M ? count : 0;
    if (p.out_vector) {
      copy_chunk<true>(chunks.at + i * Chunks::kRowBytes, chunks.out + i * p.out_stride, existing);
    } else {
      copy_chunk<false>(chunks.at + i * Chunks::kRowBytes, chunks.out + i * p.out_stride, existing);
    }
  }
  cp_async_commit();
}

// out = out_scale ∘ acc + bias, or, with what start_out has brought, out = out_scale ∘ (out + acc) + bias, through shared
// memory, so that global memory sees 16 neighbouring bytes per thread.
template <class T, class TileT, class P>
__device__ __forceinline__ void store_out(const Accumulators<TileT>& acc, const P& p, bool accumulate, uint32_t shared,
                                          int row0, int column0) {
  using Chunks = OutChunks<TileT>;
  constexpr int kRowBytes = Chunks::kRowBytes;
  const Place<TileT> place;
#pragma unroll
  for (int j = 0; j < TileT::kMmasN; ++j) {
    const int column = place.column(j);
    float scale[2], bias[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      scale[e] = at_column<T>(p.out_scale, p.out_scale_f32, p.columns, column0 + column + e, 1.f);
      bias[e] = at_column<T>(p.bias, p.bias_f32, p.columns, column0 + column + e, 0.f);
    }
#pragma unroll
    for (int i = 0; i < 2 * TileT::kMmasM; ++i) {
      const uint32_t address =
          shared + swizzle<kRowBytes>(place.row(i / 2) + i % 2 * 8, column / kVectorElements) + column % kVectorElements * 2;
      float first = acc[i / 2][j][i % 2 * 2], second = acc[i / 2][j][i % 2 * 2 + 1];
      if (accumulate) {
        const uint32_t pair = load_shared4(address);
        first += T::first(pair);
        second += T::second(pair);
      }
      store_shared(address, T::pair(scale[0] * first + bias[0], scale[1] * second + bias[1]));
    }
  }
  __syncthreads();

  const Chunks chunks(p, shared, row0, column0);
  // Not in_chunk(left) == kVectorElements: where left is negative, ptxas 13.0 makes that true on sm_90 (tools/cuda_code.py).
  const bool vector = p.out_vector && chunks.left >= kVectorElements;
#pragma unroll 2
  for (int i = 0; i < TileT::kRows; i += Chunks::kPassRows) {
    if (chunks.row + i >= p.M) return;
    const uint4 v = load_shared16(chunks.at + i * kRowBytes);
    uint16_t* const out = chunks.out + i * p.out_stride;
    if (vector) {
      __stcg(reinterpret_cast<uint4*>(out), v);  // a plain store is taken apart by the compiler
    } else {
      const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int e = 0; e < kVectorElements; ++e) {
        if (e < chunks.left) out[e] = static_cast<uint16_t>(pairs[e / 2] >> e % 2 * 16);
      }
    }
  }
}

// --- all of it --------------------------------------------------------------------------------------------------------

// Tiles in groups of kGroup above each other, then the next column of tiles: a group's rows of `in` and the columns of the
// weight that it is multiplied with stay in L2.
__device__ __forceinline__ int2 tile_of_block(int tiles_m, int tiles_n) {
  const int group = blockIdx.x / (kGroup * tiles_n), in_group = blockIdx.x % (kGroup * tiles_n);
  const int height = min(tiles_m - group * kGroup, kGroup);
  return {group * kGroup + in_group % height, in_group / height};
}

// acc += left rightᵀ
template <class T, class TileT, class P>
__device__ __forceinline__ void add_low_rank(Accumulators<TileT>& acc, const P& p, int row0, int column0) {
  if (p.right_f32) {
    multiply_low_rank<TileT, Bf16, float>(acc, p, AllRows{p.M}, row0, column0);
  } else {
    multiply_low_rank<TileT, T, T>(acc, p, AllRows{p.M}, row0, column0);
  }
}

// `in` and `weight` are copies as above, or anything else whose start(stage) brings its next step's tile into shared memory,
// by cp.async or by stores, and WeightT is what loads fragments of the weight from there. P is derived from Gemm, and may have
// an add_low_rank of its own.
template <class T, class TileT, class WeightT, bool kDropout, class P, class InCopies, class WeightCopies>
__device__ __forceinline__ void gemm(const P& p, bool accumulate, int row0, int column0, int steps, InCopies in,
                                     WeightCopies weight) {
  const uint32_t shared = shared_address(shared_memory());
  const auto start_copies = [&](uint32_t stage) {
    in.start(stage);
    weight.start(stage + TileT::kInBytes);
    cp_async_commit();
  };
  const auto start_first_copies = [&] {
    if (accumulate) start_out<TileT>(p, shared, row0, column0);
    if (steps == 0) return;
#pragma unroll
    for (int i = 0; i + 1 < TileT::kStages; ++i) start_copies(shared + i * TileT::kStageBytes);
  };
  if (!P::kSparing) start_first_copies();

  Accumulators<TileT> acc = {};
  add_low_rank<T, TileT>(acc, p, row0, column0);
  scale<TileT>(acc, p.factor);
  if constexpr (kDropout) {
    if (p.dropout.threshold > 0) drop<TileT>(acc, p.dropout, row0, column0);
  }
  if (P::kSparing) start_first_copies();

  if (steps > 0) {
    const InFragments<TileT> in_fragments;
    WeightT weight_fragments;
    uint32_t a[2][TileT::kMmasM][4], b[2][TileT::kMmasN / 2][4];
    const uint32_t end = shared + TileT::kStages * TileT::kStageBytes;
    uint32_t stage = shared, free_stage = end - TileT::kStageBytes;
    cp_async_wait<TileT::kStages - 2>();
    __syncthreads();
    in_fragments.load(a[0], stage, 0);
    weight_fragments.load(b[0], stage, 0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
#pragma unroll
      for (int k = 0; k < TileT::kMmasK; ++k) {
        if (k + 1 == TileT::kMmasK) {
          free_stage = stage;
          stage = stage + TileT::kStageBytes == end ? shared : stage + TileT::kStageBytes;
          cp_async_wait<TileT::kStages - 2>();
          __syncthreads();
        }
        in_fragments.load(a[(k + 1) % 2], stage, (k + 1) % TileT::kMmasK);
        weight_fragments.load(b[(k + 1) % 2], stage, (k + 1) % TileT::kMmasK);
        if (k == 0) start_copies(free_stage);
        multiply<T, TileT>(acc, a[k % 2], b[k % 2]);
      }
    }
  }
  if (steps > 0 || accumulate) {
    cp_async_wait<0>();
    __syncthreads();
  }
  store_out<T, TileT>(acc, p, accumulate, shared, row0, column0);
}

// kWeightRows: the weight is (columns, depth) in memory. kVector: in's and weight's rows are aligned to 16 bytes. accumulate:
// there is neither, and out holds their product.
template <class T, class TileT, bool kWeightRows, bool kVector, bool kDropout, class P>
__device__ __forceinline__ void gemm_tile(const P& p, bool accumulate, int2 tile) {
  using InCopies = RowCopies<TileT::kRows, TileT::kDepth, kVector>;
  using WeightCopies = std::conditional_t<kWeightRows, RowCopies<TileT::kColumns, TileT::kDepth, kVector>,
                                          ColumnCopies<TileT::kColumns, TileT::kDepth, kVector>>;
  const int row0 = tile.x * TileT::kRows, column0 = tile.y * TileT::kColumns;
  const int steps = accumulate ? 0 : steps_of(p.depth, TileT::kDepth);
  gemm<T, TileT, WeightFragments<TileT, kWeightRows>, kDropout>(
      p, accumulate, row0, column0, steps, InCopies(p.in, p.in_stride, row0, p.M, p.depth),
      WeightCopies(p.weight, p.weight_stride, column0, p.columns, p.depth));
}

template <class T, class TileT, bool kWeightRows, bool kVector, bool kDropout>
__global__ void __launch_bounds__(kGemmThreads, 2) gemm_kernel(const __grid_constant__ GemmOf<kDropout> p) {
  gemm_tile<T, TileT, kWeightRows, kVector, kDropout>(p, kWeightRows && kVector && p.accumulate,
                                                      tile_of_block(p.tiles_m, p.tiles_n));
}

}  // namespace lora_ops
