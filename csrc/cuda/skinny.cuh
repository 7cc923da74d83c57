// The machinery of the skinny products: one operand is wide (x or dy), the other has r columns.
//
//     lora_down            S  = drop(x) Aᵀ       rows of the wide tile times a skinny operand
//     lora_backward_up     dS = s dy B           likewise
//                          dB = s dyᵀ S          columns of the wide tile times a skinny operand
//     lora_backward_down   dA = dSᵀ drop(x)      likewise, stored transposed
//
// A block has 4 warps and walks over wide tiles of 64 rows x 128 columns (16 KB), which cp.async brings into a ring of kStages.
// From the same tile in shared memory a warp takes
//     its 16 rows,     ldmatrix        as the m16 x k16 operand whose k runs along columns (row_product), or
//     its 32 columns,  ldmatrix.trans  as the m16 x k16 operand whose k runs along rows (column_product).
// The 32 columns of warp w are {8 w + 32 q + 0...7, q = 0...3}: four neighbours in each of the four words that one Philox call
// gives. Either way a warp drops exactly the elements that it alone multiplies, in place, at the price of a __syncwarp.
//
// Parts. With adapters in x's dtype the skinny operand is rounded to it: what eager computes with. fp32 adapters promise fp32
// gradients, so their operands are cut into three bf16 parts of 8 bits, v = v0 + v1 + v2 exactly (two would lose several times
// what eager loses), and bf16 x is one part.
// fp16 x is two bf16 parts: in fp16, the parts of a small gradient would fall below the smallest number. Products of parts
// i + j > 2 are below fp32's last bit and left out. With parts, an infinite operand gives NaN (infinity times a part that is
// zero) where eager may give infinity. Scaling and 1 / (1 - p) multiply the fp32 sums.
//
// Swizzles. A tile's 16-byte chunks are numbered row by row, eight to the 128 bytes that shared memory serves at once, and a
// chunk's number is XORed with a function of its row, such that the eight addresses of an ldmatrix, or the lanes of a load of
// fp32 pairs, lie in different banks.
#pragma once

#include <cstdint>
#include <type_traits>

#include "skinny.h"
#include "tile.cuh"

namespace lora_ops {

constexpr int kTileRows = 64;
constexpr int kTileCols = 128;
constexpr int kWarps = 4;
constexpr int kThreads = kWarp * kWarps;
constexpr int kWarpRows = kTileRows / kWarps;
static_assert(kTileCols == kDropoutGroup, "a tile's columns are one group of Philox counters");

// Stages of a ring: three while two such blocks fit an SM of 164 KB, else two.
template <typename Stage>
constexpr int kStagesOf = sizeof(Stage) <= 24 * 1024 ? 3 : 2;

// How a tile is read, which decides its swizzle.
enum class Access {
  kLdmatrix,  // 16-bit elements, eight rows of one chunk at a time
  kRowPairs,  // fp32: lane (g, t) reads columns 2t, 2t + 1 of row g
  kColumns,   // fp32: lane (g, t) reads column g of row 2t
};

template <typename E, int kRowCount, int kColCount, Access kAccess>
struct SharedTile {
  using Element = E;
  static constexpr int kRows = kRowCount;
  static constexpr int kCols = kColCount;
  static constexpr int kPerChunk = kVectorBytes / sizeof(E);
  static constexpr int kChunks = kCols / kPerChunk;  // per row
  static constexpr int kBytes = kRows * kCols * sizeof(E);
  static_assert(kCols % kPerChunk == 0 && kBytes % 128 == 0, "whole chunks, and tiles that start in bank 0");

  __device__ static constexpr int swizzle(int row) {
    if (kAccess == Access::kRowPairs) return (row & 3) << 1;
    if (kAccess == Access::kColumns) return (row >> 1 & 3) << 1;
    return kChunks >= 8 ? row & 7 : row / (8 / kChunks) & (kChunks - 1);
  }
  // In elements.
  __device__ static constexpr int offset(int row, int col) {
    return (((row * kChunks + col / kPerChunk) ^ swizzle(row)) * kPerChunk) + col % kPerChunk;
  }
};

template <typename T>
using WideTile = SharedTile<T, kTileRows, kTileCols, Access::kLdmatrix>;
// Rows of a skinny operand (S, dS) that go with a wide tile.
template <int kRanks>
using SkinnyTile = SharedTile<float, kTileRows, kRanks, Access::kColumns>;

// A tile's part of a matrix: `rows` x `cols` elements from `data` on, rows `stride` elements apart; the rest of the tile is
// zero.
template <typename E>
struct Window {
  const E* data;
  int64_t stride;
  int64_t rows, cols;  // may exceed the tile, or be negative
};

// kVector: data and stride are multiples of 16 bytes. Otherwise element by element, which needs no alignment.
template <typename AnyTile, bool kVector>
__device__ __forceinline__ void load_tile(typename AnyTile::Element* tile, const Window<typename AnyTile::Element>& from) {
  using E = typename AnyTile::Element;
  if constexpr (kVector) {
    constexpr int kLoads = AnyTile::kRows * AnyTile::kChunks / kThreads, kRowStep = kThreads / AnyTile::kChunks;
    static_assert(kLoads * kThreads == AnyTile::kRows * AnyTile::kChunks, "every thread loads as many chunks");
    static_assert(AnyTile::swizzle(kRowStep) == 0, "each load of a thread is swizzled like its first");
    const int first_row = threadIdx.x / AnyTile::kChunks, col = threadIdx.x % AnyTile::kChunks * AnyTile::kPerChunk;
    const int bytes = static_cast<int>(max(min(from.cols - col, int64_t{AnyTile::kPerChunk}), int64_t{0})) * sizeof(E);
    const int rows = static_cast<int>(min(from.rows, int64_t{AnyTile::kRows}));
    const E* source = from.data + first_row * from.stride + col;
    const uint32_t target = shared_address(tile + AnyTile::offset(first_row, col));
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      cp_async16(target + i * kThreads * kVectorBytes, source, first_row + i * kRowStep < rows ? bytes : 0);
      source += kRowStep * from.stride;
    }
  } else {
    static_assert(AnyTile::kRows * AnyTile::kCols % kThreads == 0, "every thread loads as many elements");
#pragma unroll 2
    for (int i = 0; i < AnyTile::kRows * AnyTile::kCols / kThreads; ++i) {
      const unsigned at = i * kThreads + threadIdx.x;
      const int row = at / AnyTile::kCols, col = at % AnyTile::kCols;
      const bool inside = row < from.rows && col < from.cols;
      tile[AnyTile::offset(row, col)] = inside ? from.data[row * from.stride + col] : E{};
    }
  }
}

// What the tensor core multiplies for x in T and adapters in Adapter.
template <typename T, typename Adapter>
struct Parts {
  static constexpr bool kSplit = std::is_same_v<Adapter, float>;
  static_assert(kSplit || std::is_same_v<Adapter, T>, "adapters have x's dtype or are fp32");
  using Mma = std::conditional_t<kSplit, Bf16, T>;
  static constexpr int kSkinny = kSplit ? 3 : 1;
  static constexpr int kWide = std::is_same_v<Mma, T> ? 1 : 2;
};

// Bits 31...16 of both, a's below: exact where the lower bits are zero.
__device__ __forceinline__ uint32_t upper_halves(float a, float b) {
  return __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x7632);
}
__device__ __forceinline__ float without_upper_half(float a) {
  return a - __uint_as_float(__float_as_uint(a) & 0xffff0000u);
}

// The k16 x n8 fragment of a skinny operand: lane (g, t) has k = 2t, 2t + 1, 2t + 8, 2t + 9 of column g.
template <typename P>
struct SkinnyFragment {
  uint32_t part[P::kSkinny][2];

  __device__ __forceinline__ void set(int half, float a, float b) {
    if constexpr (P::kSplit) {
#pragma unroll
      for (int i = 0; i < P::kSkinny; ++i) {
        part[i][half] = upper_halves(a, b);
        a = without_upper_half(a), b = without_upper_half(b);
      }
    } else {
      part[0][half] = P::Mma::pair(a, b);
    }
  }
};

// Two neighbouring n8 fragments.
template <typename P>
using SkinnyPair = SkinnyFragment<P>[2];

template <typename P>
struct WideFragment {
  uint32_t part[P::kWide][4];

  // Of fragments as they lie in memory.
  __device__ __forceinline__ explicit WideFragment(const uint32_t (&raw)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (P::kWide == 1) {
        part[0][i] = raw[i];
      } else {
        const float first = Half::first(raw[i]), second = Half::second(raw[i]);
        part[0][i] = upper_halves(first, second);
        part[1][i] = upper_halves(without_upper_half(first), without_upper_half(second));
      }
    }
  }
};

// sum (m16 x n8) += wide skinny, the smallest products first. Those of parts add up by themselves: each of them would otherwise
// be rounded with the whole sum.
template <typename P>
__device__ __forceinline__ void multiply(float (&sum)[4], const WideFragment<P>& wide, const SkinnyFragment<P>& skinny) {
  float parts[4] = {};
  float (&to)[4] = P::kSplit ? parts : sum;
#pragma unroll
  for (int order = P::kSkinny - 1; order >= 0; --order) {
#pragma unroll
    for (int i = 0; i < P::kWide && i <= order; ++i) {
      P::Mma::mma(to, wide.part[i], skinny.part[order - i][0], skinny.part[order - i][1]);
    }
  }
  if constexpr (P::kSplit) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += parts[e];
  }
}

__device__ __forceinline__ int warp_id() {
  return threadIdx.x / kWarp;
}

// ldmatrix of the 16 x 16 elements from (row, col) on.
template <bool kTranspose, typename AnyTile>
__device__ __forceinline__ void load_fragment(uint32_t (&raw)[4], const typename AnyTile::Element* tile, int row, int col,
                                              LaneChunk lane) {
  ldmatrix_x4<kTranspose>(raw, shared_address(tile + AnyTile::offset(row + lane.row, col + lane.chunk * AnyTile::kPerChunk)));
}

// Fragments of rows k, k + 1, ... of an fp32 tile whose columns are ranks.
template <typename P, typename AnyTile>
__device__ __forceinline__ void skinny_from_columns(SkinnyPair<P>& pair, const float* tile, int k, int rank) {
  const int g = fragment_row(lane_id()), row = k + fragment_col(lane_id());
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int col = rank + 8 * n + g;
      pair[n].set(half, tile[AnyTile::offset(row + 8 * half, col)], tile[AnyTile::offset(row + 8 * half + 1, col)]);
    }
  }
}

// sum (m16 x kRanks) += this warp's 16 rows of the wide tile times a skinny operand (128 x kRanks), which
// skinny(pair, k, rank) gives as the fragments of rows k...k + 15 and ranks rank...rank + 15.
template <typename P, typename T, int kRanks, typename Skinny>
__device__ __forceinline__ void row_product(float (&sum)[kRanks / 8][4], const T* tile, Skinny skinny) {
#pragma unroll(P::kSplit ? 2 : 8)
  for (int k = 0; k < kTileCols; k += 16) {
    uint32_t raw[4];
    load_fragment<false, WideTile<T>>(raw, tile, warp_id() * kWarpRows, k, rows_first(lane_id()));
    const WideFragment<P> wide(raw);
#pragma unroll
    for (int rank = 0; rank < kRanks; rank += 16) {
      SkinnyPair<P> pair;
      skinny(pair, k, rank);
      multiply<P>(sum[rank / 8], wide, pair[0]);
      multiply<P>(sum[rank / 8 + 1], wide, pair[1]);
    }
  }
}

// Row i of the m16 operand `half` (0 or 1) of a column product is this column of the tile.
__device__ __forceinline__ int warp_column(int half, int i) {
  return 8 * warp_id() + 32 * (2 * half + i / 8) + i % 8;
}

// The m16 x k16 fragment of the wide tile's transpose: this warp's columns of `half`, rows k...k + 15.
template <typename T>
__device__ __forceinline__ void load_columns(uint32_t (&raw)[4], const T* tile, int half, int k) {
  const LaneChunk lane = chunks_first(lane_id());
  const int offset = WideTile<T>::offset(k + lane.row, warp_column(half, kVectorElements * lane.chunk));
  ldmatrix_x4<true>(raw, shared_address(tile + offset));
}

// each(raw, half) for every fragment of this warp's 32 columns of the wide tile, transposed.
template <typename T, typename Each>
__device__ __forceinline__ void each_column_fragment(const T* tile, Each each) {
#pragma unroll
  for (int k = 0; k < kTileRows; k += 16) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t raw[4];
      load_columns(raw, tile, half, k);
      each(raw, half);
    }
  }
}

// sum (2 x m16 x kRanks) += this warp's 32 columns of the wide tile, transposed, times the skinny tile.
// each(raw, half) sees every fragment of the wide tile.
template <typename P, typename T, int kRanks, typename Each>
__device__ __forceinline__ void column_product(float (&sum)[2][kRanks / 8][4], const T* tile, const float* skinny, Each each) {
#pragma unroll(P::kSplit ? 1 : 4)
  for (int k = 0; k < kTileRows; k += 16) {
    uint32_t raw[2][4];
    load_columns(raw[0], tile, 0, k);
    load_columns(raw[1], tile, 1, k);
    each(raw[0], 0);
    each(raw[1], 1);
    const WideFragment<P> wide[2] = {WideFragment<P>(raw[0]), WideFragment<P>(raw[1])};
#pragma unroll
    for (int rank = 0; rank < kRanks; rank += 16) {
      SkinnyPair<P> pair;
      skinny_from_columns<P, SkinnyTile<kRanks>>(pair, skinny, k, rank);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        multiply<P>(sum[0][rank / 8 + n], wide[0], pair[n]);
        multiply<P>(sum[1][rank / 8 + n], wide[1], pair[n]);
      }
    }
  }
}

// store(i, rank, values of rank and rank + 1) for every pair that this lane has of an m16 x kRanks sum.
template <int kRanks, typename Store>
__device__ __forceinline__ void for_each_pair(const float (&sum)[kRanks / 8][4], Store store) {
#pragma unroll
  for (int n = 0; n < kRanks / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 pair = {sum[n][2 * half], sum[n][2 * half + 1]};
      store(fragment_row(lane_id()) + 8 * half, 8 * n + fragment_col(lane_id()), pair);
    }
  }
}

// Where sums (rows, r) go, ranks from rank0 on.
struct SumRows {
  float* out;
  int64_t rows, r, rank0;
  float factor;
  bool pairs;  // out may be written two at a time: four lanes then fill a sector

  __device__ __forceinline__ SumRows(float* to, int64_t rows_, int64_t r_, int64_t rank0_, float factor_)
      : out(to),
        rows(rows_),
        r(r_),
        rank0(rank0_),
        factor(factor_),
        pairs(r_ % 2 == 0 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {}

  __device__ __forceinline__ void store(int64_t row, int n, float2 v) const {
    const int64_t rank = rank0 + n;
    if (row >= rows || rank >= r) return;
    float* const to = out + row * r + rank;
    if (pairs) {
      __stcg(reinterpret_cast<float2*>(to), {factor * v.x, factor * v.y});  // a plain store is taken apart by the compiler
    } else {
      to[0] = factor * v.x;
      if (rank + 1 < r) to[1] = factor * v.y;
    }
  }
};

// This warp's 16 rows of the tile that starts at `row`.
template <int kRanks>
__device__ __forceinline__ void store_rows(const float (&sum)[kRanks / 8][4], const SumRows& to, int64_t row) {
  for_each_pair<kRanks>(sum, [&](int i, int n, float2 v) { to.store(row + warp_id() * kWarpRows + i, n, v); });
}

// Zeroes what is dropped of the pairs of columns 2 * pair + 32 w, w = 0...3, in one row of the tile.
template <typename T>
__device__ __forceinline__ void drop_pairs(T* tile, int row, int pair, const Philox4& random, uint32_t threshold) {
#pragma unroll
  for (int word = 0; word < kDropoutWords; ++word) {
    *reinterpret_cast<uint32_t*>(tile + WideTile<T>::offset(row, 2 * pair + 32 * word)) &= keep_pair(random.v[word], threshold);
  }
}

// Drops elements of this warp's 16 rows. The tile starts at (row, col) of x. Lanes 16...31 are four rows below lanes 0...15:
// their swizzle differs in the bit that puts them into the other 64 bytes.
template <typename T>
__device__ __forceinline__ void drop_rows(T* tile, int64_t row, int64_t col, uint64_t seed, uint32_t threshold) {
  const int pair = lane_id() % 16;
#pragma unroll 2
  for (int i = 0; i < kWarpRows / 2; ++i) {
    const int tile_row = warp_id() * kWarpRows + i % 4 + 8 * (i / 4) + 4 * (lane_id() / 16);
    drop_pairs(tile, tile_row, pair, dropout_bits(seed, row + tile_row, col + 2 * pair), threshold);
  }
  __syncwarp();
}

// Drops elements of this warp's 32 columns.
template <typename T>
__device__ __forceinline__ void drop_columns(T* tile, int64_t row, int64_t col, uint64_t seed, uint32_t threshold) {
  const int pair = 4 * warp_id() + lane_id() % 4;
#pragma unroll 2
  for (int i = 0; i < kTileRows / 8; ++i) {
    const int tile_row = 8 * i + lane_id() / 4;
    drop_pairs(tile, tile_row, pair, dropout_bits(seed, row + tile_row, col + 2 * pair), threshold);
  }
  __syncwarp();
}

}  // namespace lora_ops
