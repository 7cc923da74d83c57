// dS (M, r) = s dy B ;  dB (N, r) = s dyᵀ S ;  dbias (N) = Σ_rows dy          dy (M, N), B (N, r), S (M, r); fp32 sums
//
// dy is read once: from a tile of it in shared memory come its rows times B and its columns times S. One of the two sums must
// leave the block. A block has kTiles tiles of 128 columns and walks down M in steps of 64 rows: dB and dbias stay in registers
// for the whole walk, dS is complete for its columns after each step and goes to partials (column blocks, M, r). The wider the
// block, the fewer partials, r / (64 kTiles) of dy's bytes, and the more registers dB takes: 256 columns up to rank 32, else
// 128. grid = (column blocks, splits of M, chunks of 64 ranks); dB's partials are (splits, N, r), dbias's (splits, N), and
// reduce.cu adds up all three in order and rounds. dbias is a product with a vector of ones.
//
// Shared memory: B of the block's columns, 128 kTiles x kRanks, for the whole walk; two buffers for S, 64 x kRanks; dy in a
// ring of three stages for 16 ranks, else two. At most 96 KB. Registers: kTiles kRanks sums of dB and kRanks / 2 of dS per
// thread.
#include "check.h"
#include "lora_backward_up.h"
#include "reduce.h"
#include "skinny.cuh"
#include "skinny_launch.h"

namespace lora_ops {
namespace {

struct Args : LoraBackwardUp {
  Split split;        // of M's tiles
  float* dS_sums;     // (column blocks, M, r)
  float* dB_sums;     // (split.count, N, r)
  float* dbias_sums;  // (split.count, N)
};

constexpr int tiles_of(int ranks) {
  return ranks <= 32 ? 2 : 1;
}
template <int kRanks>
constexpr int kTiles = tiles_of(kRanks);
template <int kRanks>
constexpr int kStages = kRanks == 16 ? 3 : 2;

int64_t column_blocks(const LoraBackwardUp& op) {
  return ceil_div(op.N, kTileCols * tiles_of(static_cast<int>(std::min<int64_t>(op.r, kMaxRanks))));
}

Split split_of(const LoraBackwardUp& op) {
  return split_reduction(ceil_div(op.M, kTileRows), column_blocks(op) * ceil_div(op.r, kMaxRanks), op.sm_count);
}

// Where each output's sums go: its partials, in floats within the workspace, or, where one fp32 partial is all and the output
// is contiguous, the output itself.
struct Layout {
  int64_t dS, dB, dbias;  // -1: the output itself
  int64_t size;
};

Layout layout_of(const LoraBackwardUp& op) {
  const int64_t splits = split_of(op).count, blocks = column_blocks(op);
  Layout layout{-1, -1, -1, 0};
  const auto place = [&](int64_t& offset, const void* out, int64_t partials, int64_t count, DType dtype,
                         bool contiguous = true) {
    if (!out || (partials == 1 && dtype == DType::f32 && contiguous)) return;
    offset = layout.size;
    layout.size += partials * count;
  };
  place(layout.dS, op.dS, blocks, op.M * op.r, DType::f32, op.dS_row_stride == 0);
  place(layout.dB, op.dB, splits, op.N * op.r, op.adapter_dtype);
  place(layout.dbias, op.dbias, splits, op.N, op.dbias_dtype);
  return layout;
}

// B of the block's columns: 16-bit for ldmatrix.trans, fp32 as S.
template <typename Adapter, int kRanks>
using BTile = SharedTile<Adapter, kTiles<kRanks> * kTileCols, kRanks,
                         std::is_same_v<Adapter, float> ? Access::kColumns : Access::kLdmatrix>;

template <typename T, typename Adapter, int kRanks>
struct Shared {
  alignas(128) T dy[kStages<kRanks>][kTileRows * kTileCols];
  alignas(128) float S[2][kTileRows * kRanks];
  alignas(128) Adapter B[kTiles<kRanks> * kTileCols * kRanks];
};

// Fragments of B's rows k...k + 15 for ranks rank...rank + 15.
template <typename P, typename Adapter, int kRanks>
__device__ __forceinline__ void load_B(SkinnyPair<P>& pair, const Adapter* B, int k, int rank) {
  if constexpr (P::kSplit) {
    skinny_from_columns<P, BTile<Adapter, kRanks>>(pair, B, k, rank);
  } else {
    uint32_t raw[4];
    load_fragment<true, BTile<Adapter, kRanks>>(raw, B, k, rank, rows_first(lane_id()));
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i / 2].part[0][i % 2] = raw[i];
  }
}

// Up to 32 ranks two blocks are asked for: for more of them, ptxas would spill.
template <typename T, typename Adapter, int kRanks, bool kVector>
__global__ void __launch_bounds__(kThreads, kRanks < 64 ? 2 : 0) lora_backward_up_kernel(const Args args) {
  using P = Parts<T, Adapter>;
  constexpr int kAcross = kTiles<kRanks>, kRing = kStages<kRanks>;
  static_assert(kRing - 1 <= kAcross, "S of the next step is loaded when nothing reads S of the step before this one");
  auto& shared = *reinterpret_cast<Shared<T, Adapter, kRanks>*>(shared_memory());

  const int64_t col0 = int64_t{blockIdx.x} * (kAcross * kTileCols);
  const int64_t rank0 = int64_t{blockIdx.z} * kRanks;
  const int64_t first = blockIdx.y * args.split.each;
  const int steps = static_cast<int>(min(args.split.each, args.split.steps - first));
  const T* const dy = static_cast<const T*>(args.dy) + col0;
  const bool want_dS = args.dS != nullptr, want_dB = args.dB != nullptr;
  const bool want_dbias = args.dbias != nullptr && blockIdx.z == 0;

  // Tile t of the walk: step t / kAcross, tile t % kAcross of the block's columns.
  const auto load = [&](int t) {
    const int step = t / kAcross, tile = t % kAcross;
    if (step < steps) {
      const int64_t row = (first + step) * kTileRows, col = tile * kTileCols;
      load_tile<WideTile<T>, kVector>(
          shared.dy[t % kRing], {dy + row * args.dy_row_stride + col, args.dy_row_stride, args.M - row, args.N - col0 - col});
      if (tile == 0 && want_dB) {
        load_tile<SkinnyTile<kRanks>, kVector>(
            shared.S[step % 2], {args.S + row * args.S_row_stride + rank0, args.S_row_stride, args.M - row, args.r - rank0});
      }
    }
    cp_async_commit();
  };

  float dB[kAcross][2][kRanks / 8][4] = {}, dbias[kAcross][2][4] = {};
  const uint32_t ones = T::pair(1.f, 1.f);
#pragma unroll
  for (int t = 0; t < kRing - 1; ++t) load(t);
  if (want_dS) {  // any rank is aligned for loads of one element, and this is once per block
    const Adapter* const B = static_cast<const Adapter*>(args.lora_B) + col0 * args.r + rank0;
    load_tile<BTile<Adapter, kRanks>, false>(shared.B, {B, args.r, args.N - col0, args.r - rank0});
  }
  const SumRows dS_rows(args.dS_sums + blockIdx.x * args.M * args.r, args.M, args.r, rank0, args.scaling);
  for (int step = 0; step < steps; ++step) {
    float dS[kRanks / 8][4] = {};
#pragma unroll
    for (int tile = 0; tile < kAcross; ++tile) {
      const int t = step * kAcross + tile;
      cp_async_wait<kRing - 2>();
      __syncthreads();
      load(t + kRing - 1);
      const T* const wide = shared.dy[t % kRing];
      if (want_dS) {
        row_product<P, T, kRanks>(dS, wide, [&](SkinnyPair<P>& pair, int k, int rank) {
          load_B<P, Adapter, kRanks>(pair, shared.B, tile * kTileCols + k, rank);
        });
      }
      const auto add_dbias = [&](const uint32_t (&raw)[4], int half) {
        if (want_dbias) T::mma(dbias[tile][half], raw, ones, ones);
      };
      if (want_dB) {
        column_product<P, T, kRanks>(dB[tile], wide, shared.S[step % 2], add_dbias);
      } else if (want_dbias) {
        each_column_fragment(wide, add_dbias);
      }
    }
    if (want_dS) store_rows<kRanks>(dS, dS_rows, (first + step) * kTileRows);
  }

  const SumRows dB_rows(args.dB_sums + blockIdx.y * args.N * args.r, args.N, args.r, rank0, args.scaling);
#pragma unroll
  for (int i = 0; i < 2 * kAcross; ++i) {
    const int tile = i / 2, half = i % 2;
    const int64_t col = col0 + tile * kTileCols;
    if (want_dB) {
      for_each_pair<kRanks>(dB[tile][half], [&](int m, int n, float2 v) { dB_rows.store(col + warp_column(half, m), n, v); });
    }
    if (want_dbias && fragment_col(lane_id()) == 0) {  // the n8 columns of the product are all the same
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int64_t to = col + warp_column(half, fragment_row(lane_id()) + 8 * m);
        if (to < args.N) args.dbias_sums[blockIdx.y * args.N + to] = dbias[tile][half][2 * m];
      }
    }
  }
}

}  // namespace

int64_t workspace_bytes(const LoraBackwardUp& op) {
  return layout_of(op).size * static_cast<int64_t>(sizeof(float));
}

void launch_lora_backward_up(const LoraBackwardUp& op, void* stream) {
  const Layout layout = layout_of(op);
  const auto sums = [&](int64_t offset, void* out) { return offset < 0 ? static_cast<float*>(out) : op.workspace + offset; };
  Args args{op, split_of(op), sums(layout.dS, op.dS), sums(layout.dB, op.dB), sums(layout.dbias, op.dbias)};
  if (op.S_row_stride == 0) args.S_row_stride = op.r;
  const bool vector = vectors(op.dy, op.dy_row_stride, op.dy_dtype) && (!op.dB || vectors(op.S, args.S_row_stride, DType::f32));
  dispatch(op.dy_dtype, op.adapter_dtype, op.r, vector, [&](auto t, auto adapter, auto ranks, auto is_vector) {
    using T = typename decltype(t)::type;
    using Adapter = typename decltype(adapter)::type;
    constexpr int kRanks = decltype(ranks)::value;
    const dim3 grid(column_blocks(op), args.split.count, ceil_div(op.r, kRanks));
    launch("lora_backward_up", lora_backward_up_kernel<T, Adapter, kRanks, decltype(is_vector)::value>, grid, kThreads,
           sizeof(Shared<T, Adapter, kRanks>), stream, args, shapes("M", op.M, "N", op.N, "r", op.r));
  });

  Reductions reductions;
  int count = 0;
  const auto reduce = [&](int64_t offset, int64_t partials, int64_t size, void* out, DType dtype, int64_t row_stride = 0) {
    if (offset >= 0) reductions.item[count++] = {op.workspace + offset, partials, size, out, dtype, op.r, row_stride};
  };
  reduce(layout.dS, column_blocks(op), op.M * op.r, op.dS, DType::f32, op.dS_row_stride);
  reduce(layout.dB, args.split.count, op.N * op.r, op.dB, op.adapter_dtype);
  reduce(layout.dbias, args.split.count, op.N, op.dbias, op.dbias_dtype);
  launch_reduce(reductions, stream);
}

}  // namespace lora_ops

extern "C" int64_t lora_ops_lora_backward_up_workspace_bytes(const lora_ops::LoraBackwardUp* params) {
  return lora_ops::workspace_bytes(*params);
}

extern "C" int lora_ops_lora_backward_up(const lora_ops::LoraBackwardUp* params, void* stream) {
  return lora_ops::report_errors([&] { lora_ops::launch_lora_backward_up(*params, stream); });
}
