// dA (r, K) = dSᵀ drop(x)          dS (M, r) fp32, x (M, K); fp32 sums
//
// A block has 128 columns of x, up to 64 ranks and a range of M; it walks down M in tiles of 64 rows, each read once and
// multiplied by the same rows of dS. grid = (column tiles, splits of M, chunks of 64 ranks). A split's sums are its partials
// (splits, r, K), which reduce.cu adds up in order and rounds; a single split in fp32 is dA itself.
//
// Shared memory, per stage of the ring: x 64 x 128 (16 KB) and dS 64 x kRanks (4...16 KB); two or three stages, at most 72 KB.
// Registers: kRanks sums per thread.
#include "check.h"
#include "lora_backward_down.h"
#include "reduce.h"
#include "skinny.cuh"
#include "skinny_launch.h"

namespace lora_ops {
namespace {

struct Args : LoraBackwardDown {
  Split split;  // of M's tiles
  float* sums;  // (split.count, r, K)
};

Split split_of(const LoraBackwardDown& op) {
  const int64_t blocks = ceil_div(op.K, kTileCols) * ceil_div(op.r, kMaxRanks);
  return split_reduction(ceil_div(op.M, kTileRows), blocks, op.sm_count);
}

bool needs_partials(const LoraBackwardDown& op) {
  return split_of(op).count > 1 || op.adapter_dtype != DType::f32;
}

template <typename T, int kRanks>
struct Stage {
  alignas(128) T x[kTileRows * kTileCols];
  alignas(128) float dS[kTileRows * kRanks];
};

template <typename T, typename Adapter, int kRanks, bool kVector>
__global__ void __launch_bounds__(kThreads) lora_backward_down_kernel(const Args args) {
  using P = Parts<T, Adapter>;
  constexpr int kStages = kStagesOf<Stage<T, kRanks>>;
  auto* const ring = reinterpret_cast<Stage<T, kRanks>*>(shared_memory());

  const int64_t col0 = int64_t{blockIdx.x} * kTileCols;
  const int64_t rank0 = int64_t{blockIdx.z} * kRanks;
  const int64_t first = blockIdx.y * args.split.each;
  const int tiles = static_cast<int>(min(args.split.each, args.split.steps - first));
  const T* const x = static_cast<const T*>(args.x) + col0;
  const uint64_t seed = args.dropout.threshold > 0 ? *args.dropout.seed : 0;

  const auto load = [&](int tile) {
    if (tile < tiles) {
      const int64_t row = (first + tile) * kTileRows;
      auto& stage = ring[tile % kStages];
      load_tile<WideTile<T>, kVector>(stage.x, {x + row * args.x_row_stride, args.x_row_stride, args.M - row, args.K - col0});
      load_tile<SkinnyTile<kRanks>, kVector>(stage.dS, {args.dS + row * args.r + rank0, args.r, args.M - row, args.r - rank0});
    }
    cp_async_commit();
  };

  float sum[2][kRanks / 8][4] = {};
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) load(tile);
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    load(tile + kStages - 1);
    auto& stage = ring[tile % kStages];
    if (args.dropout.threshold > 0) drop_columns(stage.x, (first + tile) * kTileRows, col0, seed, args.dropout.threshold);
    column_product<P, T, kRanks>(sum, stage.x, stage.dS, [](const uint32_t (&)[4], int) {});
  }

  float* const out = args.sums + blockIdx.y * args.r * args.K;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    for_each_pair<kRanks>(sum[half], [&](int i, int n, float2 v) {
      const int64_t col = col0 + warp_column(half, i), rank = rank0 + n;
      if (col >= args.K) return;
      if (rank < args.r) out[rank * args.K + col] = args.dropout.keep_scale * v.x;
      if (rank + 1 < args.r) out[(rank + 1) * args.K + col] = args.dropout.keep_scale * v.y;
    });
  }
}

}  // namespace

int64_t workspace_bytes(const LoraBackwardDown& op) {
  return needs_partials(op) ? split_of(op).count * op.r * op.K * static_cast<int64_t>(sizeof(float)) : 0;
}

void launch_lora_backward_down(const LoraBackwardDown& op, void* stream) {
  const bool partials = needs_partials(op);
  const Args args{op, split_of(op), partials ? op.workspace : static_cast<float*>(op.dA)};
  const bool vector = vectors(op.x, op.x_row_stride, op.x_dtype) && vectors(op.dS, op.r, DType::f32);
  dispatch(op.x_dtype, op.adapter_dtype, op.r, vector, [&](auto t, auto adapter, auto ranks, auto is_vector) {
    using T = typename decltype(t)::type;
    constexpr int kRanks = decltype(ranks)::value;
    using S = Stage<T, kRanks>;
    const dim3 grid(ceil_div(op.K, kTileCols), args.split.count, ceil_div(op.r, kRanks));
    launch("lora_backward_down",
           lora_backward_down_kernel<T, typename decltype(adapter)::type, kRanks, decltype(is_vector)::value>, grid, kThreads,
           kStagesOf<S> * sizeof(S), stream, args, shapes("M", op.M, "K", op.K, "r", op.r));
  });
  if (partials) launch_reduce({{{args.sums, args.split.count, op.r * op.K, op.dA, op.adapter_dtype}}}, stream);
}

}  // namespace lora_ops

extern "C" int64_t lora_ops_lora_backward_down_workspace_bytes(const lora_ops::LoraBackwardDown* params) {
  return lora_ops::workspace_bytes(*params);
}

extern "C" int lora_ops_lora_backward_down(const lora_ops::LoraBackwardDown* params, void* stream) {
  return lora_ops::report_errors([&] { lora_ops::launch_lora_backward_down(*params, stream); });
}
