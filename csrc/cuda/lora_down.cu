// S (M, r) = drop(x) Aᵀ          x (M, K), A (r, K); fp32 sums
//
// A block has 64 rows of x, up to 64 ranks and a range of K; it walks along K in tiles of 128 columns, each read once and
// multiplied for all of the block's ranks. grid = (row tiles, splits of K, chunks of 64 ranks): x is read once for r <= 64.
// Where the row tiles are fewer than the GPU wants blocks, K is split, every split writes its sums to partials (splits, M, r),
// and reduce.cu adds them up in order.
//
// Shared memory, per stage of the ring: x 64 x 128 (16 KB) and A kRanks x 128 (in fp32, 64 ranks: 32 KB). Two or three stages
// are at most 96 KB, which every architecture has. Registers: kRanks / 2 sums per thread; left alone,
// ptxas takes 255 for addresses on sm_100 and later, hence the bound.
#include "check.h"
#include "lora_down.h"
#include "reduce.h"
#include "skinny.cuh"
#include "skinny_launch.h"

namespace lora_ops {
namespace {

struct Args : LoraDown {
  Split split;  // of K's tiles
  float* sums;  // (split.count, M, r)
};

Split split_of(const LoraDown& op) {
  const int64_t blocks = ceil_div(op.M, kTileRows) * ceil_div(op.r, kMaxRanks);
  return split_reduction(ceil_div(op.K, kTileCols), blocks, op.sm_count);
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

template <typename T, typename Adapter, int kRanks, bool kVector>
__global__ void __launch_bounds__(kThreads, 3) lora_down_kernel(const Args args) {
  using P = Parts<T, Adapter>;
  constexpr int kStages = kStagesOf<Stage<T, Adapter, kRanks>>;
  auto* const ring = reinterpret_cast<Stage<T, Adapter, kRanks>*>(shared_memory());

  const int64_t row0 = int64_t{blockIdx.x} * kTileRows;
  const int64_t rank0 = int64_t{blockIdx.z} * kRanks;
  const int64_t first = blockIdx.y * args.split.each;
  const int tiles = static_cast<int>(min(args.split.each, args.split.steps - first));
  const T* const x = static_cast<const T*>(args.x) + row0 * args.x_row_stride;
  const Adapter* const A = static_cast<const Adapter*>(args.lora_A) + rank0 * args.K;
  const uint64_t seed = args.dropout.threshold > 0 ? *args.dropout.seed : 0;

  const auto load = [&](int tile) {
    if (tile < tiles) {
      const int64_t col = (first + tile) * kTileCols;
      auto& stage = ring[tile % kStages];
      load_tile<WideTile<T>, kVector>(stage.x, {x + col, args.x_row_stride, args.M - row0, args.K - col});
      load_tile<ATile<Adapter, kRanks>, kVector>(stage.A, {A + col, args.K, args.r - rank0, args.K - col});
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
  const SumRows to(args.sums + blockIdx.y * args.M * args.r, args.M, args.r, rank0, args.dropout.keep_scale);
  store_rows<kRanks>(sum, to, row0);
}

}  // namespace

int64_t workspace_bytes(const LoraDown& op) {
  const Split split = split_of(op);
  return split.count == 1 ? 0 : split.count * op.M * op.r * static_cast<int64_t>(sizeof(float));
}

void launch_lora_down(const LoraDown& op, void* stream) {
  if (op.M == 0) return;
  Args args{op, split_of(op), nullptr};
  args.sums = args.split.count == 1 ? op.S : op.workspace;
  const bool vector = vectors(op.x, op.x_row_stride, op.x_dtype) && vectors(op.lora_A, op.K, op.adapter_dtype);
  dispatch(op.x_dtype, op.adapter_dtype, op.r, vector, [&](auto t, auto adapter, auto ranks, auto is_vector) {
    using T = typename decltype(t)::type;
    using Adapter = typename decltype(adapter)::type;
    constexpr int kRanks = decltype(ranks)::value;
    using S = Stage<T, Adapter, kRanks>;
    const dim3 grid(ceil_div(op.M, kTileRows), args.split.count, ceil_div(op.r, kRanks));
    launch("lora_down", lora_down_kernel<T, Adapter, kRanks, decltype(is_vector)::value>, grid, kThreads,
           kStagesOf<S> * sizeof(S), stream, args, shapes("M", op.M, "K", op.K, "r", op.r));
  });
  if (args.split.count > 1) {
    launch_reduce({{{args.sums, args.split.count, op.M * op.r, op.S, DType::f32}}}, stream);
  }
}

}  // namespace lora_ops

extern "C" int64_t lora_ops_lora_down_workspace_bytes(const lora_ops::LoraDown* params) {
  return lora_ops::workspace_bytes(*params);
}

extern "C" int lora_ops_lora_down(const lora_ops::LoraDown* params, void* stream) {
  return lora_ops::report_errors([&] { lora_ops::launch_lora_down(*params, stream); });
}
