// The tile of a GEMM's output, and the low-rank product in its accumulators: acc = factor · drop'((left ∘ gate) rightᵀ).
//
//     left (M, r) fp32: S or dS          right (columns, r): B, or A's transpose          gate (r) or (M, r) fp32, or none
//
// fp32 operands of both sides enter the tensor cores as two bf16 parts each, hi · hi + hi · lo + lo · hi: fp32's range, and 16
// bits. Where the adapters are 16-bit, right is one part as it is and left is rounded to one, which is what eager does.
//
// Infinite or NaN operands in two parts give NaN.
#pragma once

#include <type_traits>

#include "params.h"
#include "tile.cuh"

namespace lora_ops {

constexpr int kGemmThreads = 128;
constexpr int kGroup = 8;  // tiles above each other that run at about the same time, for the sake of L2

template <int kRows_, int kColumns_, int kDepth_, int kWarpsM_, int kStages_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kDepth = kDepth_, kStages = kStages_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kGemmThreads / kWarp / kWarpsM;
  static constexpr int kMmasM = kRows / kWarpsM / kMmaM, kMmasN = kColumns / kWarpsN / kMmaN, kMmasK = kDepth / kMmaK;
  static constexpr int kMmasPer32 = 32 / kMmaN / kWarpsN;  // of a warp, in 32 neighbouring columns
  static constexpr int kInBytes = kRows * kDepth * 2, kWeightBytes = kColumns * kDepth * 2,
                       kStageBytes = kInBytes + kWeightBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kRows * kColumns * 2 <= kSharedBytes, "out leaves through the stages' memory");
  static_assert(kMmasN % 2 == 0 && kMmasK % 2 == 0, "fragments come in pairs");

  // First column of a warp's mma j. column(2 p + i) = column(2 p) + column(i) for i = 0, 1.
  static constexpr __device__ int column(int j) { return j / kMmasPer32 * 32 + j % kMmasPer32 * kMmaN; }
};

using LargeTile = Tile<128, 128, 32, 2, 3>;
using MediumTile = Tile<64, 64, 64, 2, 3>;
using SmallTile = Tile<32, 64, 64, 1, 4>;

// out (M, columns) = out_scale ∘ (in (M, depth) weightᵀ + factor · drop'((left ∘ gate) (M, rank) right (columns, rank)ᵀ)) +
// bias
struct Gemm {
  static constexpr bool kSparing = false;  // with registers: less is under way at a time
  int M, columns, depth, rank;
  int tiles_m, tiles_n;
  const uint16_t* in;      // (M, depth), rows in_stride apart
  const uint16_t* weight;  // (columns, depth) or (depth, columns), rows weight_stride apart
  const float* left;       // (M, rank), rows left_stride apart
  const void* right;       // (columns, rank) of any strides, fp32 or T
  const void* bias;        // (columns), fp32 or T, or null
  uint16_t* out;           // (M, columns), rows out_stride apart
  int64_t in_stride, weight_stride, out_stride;
  int64_t right_column_stride, right_rank_stride;
  float factor;
  DeviceDropout dropout;
  bool accumulate;  // out already holds in weightᵀ, and both are absent: of rows that are vectors, says set_weight
  bool right_f32, bias_f32;
  bool left_vector, right_vector, out_vector;  // four neighbouring ranks, or eight columns, are one aligned load or store
  int64_t left_stride;
  const float* gate;      // (M, rank), rows gate_stride apart, or null
  int64_t gate_stride;    // 0: one gate for all rows
  const void* out_scale;  // (columns), fp32 or T, or null
  bool out_scale_f32;
};

// What is constant in some kernels hides the member that it is a value of, and the compiler leaves out what depends on it.
struct GemmDx : Gemm {
  static constexpr const void *out_scale = nullptr, *bias = nullptr;
};
template <class P>
struct Plain : P {
  static constexpr const void* out_scale = nullptr;
  static constexpr const float* gate = nullptr;
};

// kDropout: dx, whose kernels alone have dropout in them.
template <bool kDropout>
using GemmOf = std::conditional_t<kDropout, GemmDx, Gemm>;

template <class TileT>
using Accumulators = float[TileT::kMmasM][TileT::kMmasN][4];

// Where a thread's accumulators lie: acc[i][j][0 .. 3] are rows row(i), row(i) + 8 and columns column(j), column(j) + 1.
template <class TileT>
struct Place {
  int warp_row, warp_column, lane;

  __device__ Place() : lane(lane_id()) {
    const int warp = threadIdx.x / kWarp;
    warp_row = warp / TileT::kWarpsN * TileT::kMmasM * kMmaM;
    warp_column = warp % TileT::kWarpsN * TileT::kMmasPer32 * kMmaN;
  }
  __device__ int row(int i) const { return warp_row + i * kMmaM + fragment_row(lane); }
  __device__ int column(int j) const { return warp_column + TileT::column(j) + fragment_col(lane); }
};

// --- low-rank product -------------------------------------------------------------------------------------------------

// Four neighbouring ranks, at p and stride apart, of which `left` exist.
template <class V>
__device__ __forceinline__ void load_ranks(float (&v)[4], const V* p, int64_t stride, int left) {
#pragma unroll
  for (int e = 0; e < 4; ++e) v[e] = e < left ? to_float(p[e * stride]) : 0.f;
}
__device__ __forceinline__ void load_ranks_vector(float (&v)[4], const float* p, int left) {
  const float4 f = left > 0 ? __ldg(reinterpret_cast<const float4*>(p)) : float4{0.f, 0.f, 0.f, 0.f};
  v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
}
template <class T>
__device__ __forceinline__ void load_ranks_vector(float (&v)[4], const T* p, int left) {
  const uint2 u = left > 0 ? __ldg(reinterpret_cast<const uint2*>(p)) : uint2{0u, 0u};
  v[0] = T::first(u.x), v[1] = T::second(u.x), v[2] = T::first(u.y), v[3] = T::second(u.y);
}

// Which rows of left there are, and what becomes of them: here, rows beyond the last repeat it.
struct AllRows {
  int rows;
  __device__ __forceinline__ int existing(int row) const { return min(row, rows - 1); }
  __device__ __forceinline__ void weigh(float (&)[4], int) const {}
};

// acc += (left ∘ gate) rightᵀ with Part the type of the parts of which an operand has one (V = Part) or two (V = float).
//
// An mma's 16 depths may be any 16 ranks in any order as long as A and B agree: a thread's are four neighbours, one load.
template <class TileT, class Part, class V, class P, class Rows>
__device__ __forceinline__ void multiply_low_rank(Accumulators<TileT>& acc, const P& p, Rows rows, int row0, int column0) {
  constexpr bool kTwoParts = sizeof(V) == 4;
  constexpr int kM = TileT::kMmasM, kN = TileT::kMmasN;
  constexpr int kTogether = kN < 4 ? kN : 4;  // columns whose loads are under way together; more cost registers
  const Place<TileT> place;
  const V* right = static_cast<const V*>(p.right);
#pragma unroll 1
  for (int rank0 = 0; rank0 < p.rank; rank0 += kMmaK) {
    const int rank = rank0 + place.lane % 4 * 4;
    const int left_over = p.rank - rank;
    const int row_of_tile = recomputed(row0), column_of_tile = recomputed(column0);
    const auto row_at = [&](int i) { return row_of_tile + place.row(i / 2) + i % 2 * 8; };
    const auto a_at = [&](int i) { return p.left + rows.existing(row_at(i)) * p.left_stride + rank; };
    const auto b_at = [&](int j) {
      const int column = min(column_of_tile + place.warp_column + TileT::column(j) + fragment_row(place.lane), p.columns - 1);
      return right + column * p.right_column_stride + rank * p.right_rank_stride;
    };
    float a[2 * kM][4];
    if (p.left_vector) {
#pragma unroll
      for (int i = 0; i < 2 * kM; ++i) load_ranks_vector(a[i], a_at(i), left_over);
    } else {
#pragma unroll
      for (int i = 0; i < 2 * kM; ++i) load_ranks(a[i], a_at(i), 1, left_over);
    }
    if (p.gate != nullptr) {
#pragma unroll
      for (int i = 0; i < 2 * kM; ++i) {
        float gate[4];
        load_ranks(gate, p.gate + rows.existing(row_at(i)) * p.gate_stride + rank, 1, left_over);
#pragma unroll
        for (int e = 0; e < 4; ++e) a[i][e] *= gate[e];
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) rows.weigh(a[i], row_at(i));
    uint32_t a_hi[kM][4], a_lo[kM][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        split<Part>(a[2 * i + e % 2][e / 2 * 2], a[2 * i + e % 2][e / 2 * 2 + 1], a_hi[i][e], a_lo[i][e]);
    }

#pragma unroll
    for (int group = 0; group < kN; group += kTogether) {
      float b[kTogether][4];
      if (p.right_vector) {
#pragma unroll
        for (int j = 0; j < kTogether; ++j) load_ranks_vector(b[j], b_at(group + j), left_over);
      } else {
#pragma unroll
        for (int j = 0; j < kTogether; ++j) load_ranks(b[j], b_at(group + j), p.right_rank_stride, left_over);
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        uint32_t b_hi[2], b_lo[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) split<Part>(b[j][2 * e], b[j][2 * e + 1], b_hi[e], b_lo[e]);
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          if constexpr (kTwoParts) {
            Part::mma(acc[i][group + j], a_lo[i], b_hi[0], b_hi[1]);
            Part::mma(acc[i][group + j], a_hi[i], b_lo[0], b_lo[1]);
          }
          Part::mma(acc[i][group + j], a_hi[i], b_hi[0], b_hi[1]);
        }
      }
    }
  }
}

template <class TileT>
__device__ __forceinline__ void scale(Accumulators<TileT>& acc, float factor) {
#pragma unroll
  for (int i = 0; i < TileT::kMmasM; ++i) {
#pragma unroll
    for (int j = 0; j < TileT::kMmasN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] *= factor;
    }
  }
}

// What dropout dropped becomes zero.
template <class TileT>
__device__ __forceinline__ void drop(Accumulators<TileT>& acc, const DeviceDropout& dropout, int row0, int column0) {
  static_assert(kDropoutGroup % TileT::kColumns == 0, "a tile's columns lie in one group");
  constexpr int kBlocks = TileT::kColumns / 32;
  const Place<TileT> place;
  const uint64_t seed = __ldg(reinterpret_cast<const unsigned long long*>(dropout.seed));
  const bool upper_half = column0 % kDropoutGroup != 0;  // of a group that two tiles share
#pragma unroll
  for (int i = 0; i < 2 * TileT::kMmasM; ++i) {
#pragma unroll
    for (int j = 0; j < TileT::kMmasPer32; ++j) {
      const unsigned row = row0 + place.row(i / 2) + i % 2 * 8, column = column0 + place.column(j);
      const Philox4 bits = dropout_bits(seed, row, column);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const uint32_t word = kBlocks < kDropoutWords && upper_half ? bits.v[kDropoutWords - kBlocks + block] : bits.v[block];
        float* pair = acc[i / 2][block * TileT::kMmasPer32 + j] + i % 2 * 2;
        pair[0] = keep_first(word, dropout.threshold) ? pair[0] : 0.f;
        pair[1] = keep_second(word, dropout.threshold) ? pair[1] : 0.f;
      }
    }
  }
}

}  // namespace lora_ops
