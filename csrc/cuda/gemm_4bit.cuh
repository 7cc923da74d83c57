// gemm.cuh's kernel with a weight in 4 bits, which is decoded from shared memory straight into fragments: it exists nowhere
// else.
//
//     out (M, columns) = in (M, depth) · weightᵀ + factor · drop'(left rightᵀ) + bias
//
//     forward   columns = N, depth = K: a tile of the weight is its rows, a step of depth a chunk of 128 weights
//     dx        columns = K, depth = N: a tile of the weight is a chunk of each row, a step of depth some rows
//
// A stage of the ring holds the weight as it is in memory: 64 bytes of codes per row and chunk, in 16-byte pieces, and four
// scales, one per 32 neighbours of the chunk. So this takes K a multiple of 128 (whole chunks, in which blocks of scales begin)
// and rows of `in` at multiples of 16 bytes. Other shapes are decoded as a whole, by dequantize_4bit.
//
// Nibble j of word w is the weight 32 j + w of its chunk (../nf4.h), which is made for fragments:
//
//     forward   a lane's k are words 2t, 2t + 1, 2t + 8, 2t + 9 of its column: one dword per pair, four dwords the whole chunk
//     dx        a lane's column is word 8 warp + g of the rows 2t, 2t + 1, 2t + 8, 2t + 9: four words, and nibble j is the
//               column of mma j, since a warp's columns are 8 of every 32
//
// The four warps share the columns and no rows, so every weight of a tile is decoded once. Its value comes from a table of 16
// floats in shared memory, all in different banks; times its scale in fp32, rounded once to T: bit for bit the weight that
// dequantize_4bit gives.
#pragma once

#include "gemm.cuh"
#include "weight_4bit.cuh"

namespace lora_ops {

template <bool kDropout>
struct Gemm4Bit {
  Plain<GemmOf<kDropout>> gemm;
  CudaQuantizedWeight weight;
  int64_t row_weights;  // K, half as many bytes of codes
  int shift;            // of the block size
  float values[kCodes];
};

// A stage's layout: in as in gemm.cuh, then the codes, then the scales.
template <class TileT, bool kWeightRows_>
struct Tile4Bit : TileT {
  static constexpr bool kWeightRows = kWeightRows_;
  static constexpr int kWeightTileRows = kWeightRows ? TileT::kColumns : TileT::kDepth;
  static constexpr int kCodeBytes = kWeightTileRows * kChunkBytes;
  static constexpr int kScaleBytes = kRunsPerChunk * sizeof(float);  // of a row
  static constexpr int kWeightBytes = kCodeBytes + kWeightTileRows * kScaleBytes;
  static constexpr int kStageBytes = TileT::kInBytes + kWeightBytes;
  static constexpr int kStagesBytes = TileT::kStages * kStageBytes;
  static constexpr int kSharedBytes = kStagesBytes + kCodes * sizeof(float);
  static_assert(kWeightRows ? TileT::kDepth == kChunk : TileT::kColumns == kChunk, "a row of the tile is a chunk");
  static_assert(TileT::kWarpsM == 1 && kWeightTileRows <= kGemmThreads,
                "no weight is decoded twice; a thread per row's scales");
  static_assert(TileT::kRows * TileT::kColumns * 2 <= kStagesBytes, "out leaves through the stages' memory");
};

// Brings codes and scales into a stage. The scales of a step are sent for a step ahead, so that nobody waits for them.
template <class TileT, bool kDropout>
struct Copies4Bit {
  static constexpr bool kWeightRows = TileT::kWeightRows;
  static constexpr int kPieces = kChunkBytes / kVectorBytes, kPassRows = kGemmThreads / kPieces;
  static constexpr int kPasses = TileT::kWeightTileRows / kPassRows;
  static_assert(kPassRows % 8 == 0, "a pass below, the swizzle is the same");
  const Gemm4Bit<kDropout>& p;
  const uint8_t* from[kPasses];
  uint32_t to;
  int left;        // of depth, from this thread's row in the first pass on
  int64_t weight;  // the first one of the chunk whose scales are this thread's
  int scales_left;
  ChunkScales scales;

  // For the tile that begins at `column0` of out.
  __device__ Copies4Bit(const Gemm4Bit<kDropout>& p_, int column0) : p(p_) {
    const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) from[i] = p.weight.codes + at(column0, row + i * kPassRows) / 2 + piece * kVectorBytes;
    to = swizzle<kChunkBytes>(row, piece);
    left = p.gemm.depth - (kWeightRows ? 0 : row);
    weight = at(column0, threadIdx.x);
    scales_left = p.gemm.depth - (kWeightRows ? 0 : threadIdx.x);
    load_scales();
  }

  __device__ void start(uint32_t shared) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const bool exists = left > (kWeightRows ? 0 : i * kPassRows);
      cp_async16(shared + to + i * kPassRows * kChunkBytes, from[i], exists ? kVectorBytes : 0);
      from[i] += step() / 2;
    }
    left -= TileT::kDepth;
    if (threadIdx.x < TileT::kWeightTileRows) {
      store_shared(shared + TileT::kCodeBytes + threadIdx.x * TileT::kScaleBytes, scales.decoded(p.weight));
    }
    load_scales();
  }

 private:
  // The first weight of the first step's chunk of the tile's row `row`. Rows of out's columns that do not exist repeat the
  // last.
  __device__ int64_t at(int column0, int row) const {
    return kWeightRows ? min(column0 + row, p.gemm.columns - 1) * p.row_weights : row * p.row_weights + column0;
  }
  __device__ int64_t step() const { return kWeightRows ? kChunk : TileT::kDepth * p.row_weights; }

  __device__ void load_scales() {
    scales.load(p.weight, weight, p.shift, threadIdx.x < TileT::kWeightTileRows && scales_left > 0);
    weight += step();
    scales_left -= TileT::kDepth;
  }
};

// Decodes the fragments of the weight of one mma's depth, `k` of kMmasK. In the forward they are asked for in the order of k.
template <class T, class TileT>
struct Fragments4Bit {
  static constexpr bool kWeightRows = TileT::kWeightRows;
  static constexpr int kPieces = kChunkBytes / kVectorBytes, kMmas = TileT::kMmasN;
  const uint32_t table;
  uint32_t code_offset[kWeightRows ? kPieces : 1], scale_offset;
  uint32_t dwords[kMmas][kPieces];  // forward: a chunk of each of this lane's columns
  uint4 scales[kMmas];

  __device__ Fragments4Bit() : table(shared_address(shared_memory()) + TileT::kStagesBytes) {
    const Place<TileT> place;
    const int g = fragment_row(place.lane), t = place.lane % 4;
    const int row = kWeightRows ? place.warp_column + g : 2 * t;
#pragma unroll
    for (int i = 0; i < (kWeightRows ? kPieces : 1); ++i) {
      const int piece = kWeightRows ? i : threadIdx.x / kWarp, in_piece = kWeightRows ? 4 * t : 2 * g;
      code_offset[i] = TileT::kInBytes + swizzle<kChunkBytes>(row, piece) + in_piece;
    }
    scale_offset = TileT::kInBytes + TileT::kCodeBytes + row * TileT::kScaleBytes;
  }

  __device__ void load(uint32_t (&b)[kMmas / 2][4], uint32_t stage, int k) {
    if constexpr (kWeightRows) {
      if (k == 0) load_chunks(stage);
#pragma unroll
      for (int j = 0; j < kMmas; ++j) {
        const float scale = of_run(scales[j], k / 2);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t words = dwords[j][k % 2 * 2 + half];
          b[j / 2][j % 2 * 2 + half] = T::pair(value(words, k / 2) * scale, value(words >> 16, k / 2) * scale);
        }
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = k * kMmaK + half * 8;
        const uint32_t codes = stage + code_offset[0] + row * kChunkBytes, at = stage + scale_offset + row * TileT::kScaleBytes;
        const uint32_t first = load_shared2(codes), second = load_shared2(codes + kChunkBytes);
        const uint4 first_scales = load_shared16(at), second_scales = load_shared16(at + TileT::kScaleBytes);
#pragma unroll
        for (int j = 0; j < kMmas; ++j) {
          b[j / 2][j % 2 * 2 + half] =
              T::pair(value(first, j) * of_run(first_scales, j), value(second, j) * of_run(second_scales, j));
        }
      }
    }
  }

 private:
  __device__ void load_chunks(uint32_t stage) {
#pragma unroll
    for (int j = 0; j < kMmas; ++j) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) dwords[j][i] = load_shared4(stage + code_offset[i] + TileT::column(j) * kChunkBytes);
      scales[j] = load_shared16(stage + scale_offset + TileT::column(j) * TileT::kScaleBytes);
    }
  }
  // Of nibble j of a word.
  __device__ float value(uint32_t word, int j) const {
    return lookup_shared(table + ((j == 0 ? word << 2 : word >> (4 * j - 2)) & (kCodes - 1) << 2));
  }
  static __device__ float of_run(const uint4& scales, int run) {
    return __uint_as_float(run == 0 ? scales.x : run == 1 ? scales.y : run == 2 ? scales.z : scales.w);
  }
};

template <class T, class TileT, bool kDropout>
__global__ void __launch_bounds__(kGemmThreads, 2) gemm_4bit_kernel(const __grid_constant__ Gemm4Bit<kDropout> p) {
  using InCopies = RowCopies<TileT::kRows, TileT::kDepth, true>;
  store_values(shared_address(shared_memory()) + TileT::kStagesBytes, p.values);
  const int2 tile = tile_of_block(p.gemm.tiles_m, p.gemm.tiles_n);
  const int row0 = tile.x * TileT::kRows, column0 = tile.y * TileT::kColumns;
  gemm<T, TileT, Fragments4Bit<T, TileT>, kDropout>(p.gemm, false, row0, column0, steps_of(p.gemm.depth, TileT::kDepth),
                                                    InCopies(p.gemm.in, p.gemm.in_stride, row0, p.gemm.M, p.gemm.depth),
                                                    Copies4Bit<TileT, kDropout>(p, column0));
}

}  // namespace lora_ops
