// What lora_down.cu and lora_down_segments.cu share: S (M, r) = drop(x) Aᵀ          x (M, K), A (r, K); fp32 sums
//
// A block has 64 rows of x, up to 64 ranks and a range of K; it walks along K in tiles of 128 columns, each read once and
// multiplied for all of the block's ranks. grid = (row tiles, splits of K, chunks of 64 ranks): x is read once for r <= 64.
// Where the row tiles are fewer than the GPU wants blocks, K is split, every split writes its sums to partials (splits, M, r),
// and reduce.cu adds them up in order.
//
// Shared memory, per stage of the ring: x 64 x 128 (16 KB) and A kRanks x 128 (in fp32, 64 ranks: 32 KB). Two or three stages
// are at most 96 KB, which every architecture has. Registers: kRanks / 2 sums per thread; left alone,
// ptxas takes 255 for addresses on sm_100 and later, hence the bound.
#pragma once

#include "check.h"
#include "lora_down.h"
#include "reduce.h"
#include "skinny.cuh"
#include "skinny_launch.h"

namespace lora_ops {

struct LoraDownArgs : LoraDown {
  Split split;  // of K's tiles
  float* sums;  // (split.count, M, r)
};

// row_blocks: how many blocks there are for every split and every chunk of ranks.
inline Split split_of(const LoraDown& op, int64_t row_blocks) {
  return split_reduction(ceil_div(op.K, kTileCols), row_blocks * ceil_div(op.r, kMaxRanks), op.sm_count);
}

template <typename Adapter, int kRanks>
using ATile = SharedTile<Adapter, kRanks, kTileCols, std::is_same_v<Adapter, float> ? Access::kRowPairs : Access::kLdmatrix>;

template <typename T, typename Adapter, int kRanks>
struct Stage {
  alignas(128) T x[kTileRows * kTileCols];
  alignas(128) Adapter A[kRanks * kTileCols];
};

// Fragments of A's columns k...k + 15 for ranks rank...rank + 15.
template <typename P, typename Adapter, int kRanks>
__device__ __forceinline__ void load_A(SkinnyPair<P>& pair, const Adapter* A, int k, int rank) {
  const int lane = lane_id();
  if constexpr (P::kSplit) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int offset = ATile<Adapter, kRanks>::offset(rank + 8 * n + fragment_row(lane), k + 8 * half + fragment_col(lane));
        const float2 v = *reinterpret_cast<const float2*>(A + offset);
        pair[n].set(half, v.x, v.y);
      }
    }
  } else {
    uint32_t raw[4];
    load_fragment<false, ATile<Adapter, kRanks>>(raw, A, rank, k, chunks_first(lane));
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i / 2].part[0][i % 2] = raw[i];
  }
}

// S's rows row0 ... end - 1, at most a tile of them, with the block's share of K: `tiles` tiles, none of which leaves zeros.
// lora_A (r, K).
template <typename T, typename Adapter, int kRanks, bool kVector>
__device__ __forceinline__ void lora_down_rows(const LoraDownArgs& args, int64_t row0, int64_t end, const void* lora_A, int64_t r,
                                               int tiles) {
  using P = Parts<T, Adapter>;
  constexpr int kStages = kStagesOf<Stage<T, Adapter, kRanks>>;
  auto* const ring = reinterpret_cast<Stage<T, Adapter, kRanks>*>(shared_memory());

  const int64_t rank0 = int64_t{blockIdx.z} * kRanks;
  const int64_t first = blockIdx.y * args.split.each;
  const T* const x = static_cast<const T*>(args.x) + row0 * args.x_row_stride;
  const Adapter* const A = static_cast<const Adapter*>(lora_A) + rank0 * args.K;
  const uint64_t seed = args.dropout.threshold > 0 ? *args.dropout.seed : 0;

  const auto load = [&](int tile) {
    if (tile < tiles) {
      const int64_t col = (first + tile) * kTileCols;
      auto& stage = ring[tile % kStages];
      load_tile<WideTile<T>, kVector>(stage.x, {x + col, args.x_row_stride, end - row0, args.K - col});
      load_tile<ATile<Adapter, kRanks>, kVector>(stage.A, {A + col, args.K, r - rank0, args.K - col});
    }
    cp_async_commit();
  };

  float sum[kRanks / 8][4] = {};
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) load(tile);
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    load(tile + kStages - 1);
    auto& stage = ring[tile % kStages];
    if (args.dropout.threshold > 0) drop_rows(stage.x, row0, (first + tile) * kTileCols, seed, args.dropout.threshold);
    row_product<P, T, kRanks>(
        sum, stage.x, [&](SkinnyPair<P>& pair, int k, int rank) { load_A<P, Adapter, kRanks>(pair, stage.A, k, rank); });
  }
  const SumRows to(args.sums + blockIdx.y * args.M * args.r, end, args.r, rank0, args.dropout.keep_scale);
  store_rows<kRanks>(sum, to, row0);
}

// Of K's tiles, those of this block.
__device__ __forceinline__ int tiles_of_block(const Split& split) {
  return static_cast<int>(min(split.each, split.steps - blockIdx.y * split.each));
}

// What runs for an op, on `row_blocks` blocks: Kernel::instance<T, Adapter, kRanks, kVector>(), which takes Args.
template <typename Kernel, typename Args>
void launch_rows(const char* name, const Args& args, int64_t row_blocks, bool vector, void* stream) {
  dispatch(args.x_dtype, args.adapter_dtype, args.r, vector, [&](auto t, auto adapter, auto ranks, auto is_vector) {
    using T = typename decltype(t)::type;
    using Adapter = typename decltype(adapter)::type;
    constexpr int kRanks = decltype(ranks)::value;
    using S = Stage<T, Adapter, kRanks>;
    const dim3 grid(row_blocks, args.split.count, ceil_div(args.r, kRanks));
    launch(name, Kernel::template instance<T, Adapter, kRanks, decltype(is_vector)::value>(), grid, kThreads,
           kStagesOf<S> * sizeof(S), stream, args, shapes("M", args.M, "K", args.K, "r", args.r));
  });
  if (args.split.count > 1) {
    launch_reduce({{{args.sums, args.split.count, args.M * args.r, args.S, DType::f32}}}, stream);
  }
}

}  // namespace lora_ops
