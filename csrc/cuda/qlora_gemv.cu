// y = x W0ᵀ + scaling · S Bᵀ + bias      (M, N) = (M, K) (K, N) + (M, r) (r, N), M <= 8, W0 in 4 bits
//
// Each code is read once, from memory straight into registers, and everything is arranged for few instructions per code. The
// tensor core's roles are swapped: D (16 rows of W0, 8 rows of x) += A (codes) B (xᵀ). Its depths may be any 16 columns in any
// order as long as A and B agree, so a register of A is the two nibbles of one byte, columns w and w + 32 of a chunk
// (../nf4.h), and the byte is the index of a table of pairs in T: one lookup, two weights. Every lane has a copy of the table
// in a bank of its own, 32 KB together. A lane (g, t) = (lane / 4, lane % 4) has words 8 t ... 8 t + 7 of rows g and g + 8:
//
//     16 bytes of each row's chunk    four dwords of two words; byte b of dword j is A of mma j of half b % 2, register b / 2
//     x[g][32 run + 8 t ...], 4 runs  16 bytes each; elements 2 j and 2 j + 1 of a half's two runs are B of mma j
//
// Half h of a chunk is its runs 2 h and 2 h + 1, four mmas. Codes are multiplied as they are, rounded to T (which loses less
// than to round weights), and the half's fp32 scale multiplies the sum. Where blocks are of 32, the two runs of a half have
// sums of their own: two mmas, the other run's x being zero.
//
// A block has 16 or 32 rows of W0; its eight warps take a chunk in turn, each has kStages of them under way, and adds every
// eighth rank. The warps' sums are added in their order. The result depends neither on the rows per block nor on M.
#include <algorithm>
#include <climits>
#include <type_traits>

#include "check.h"
#include "qlora_forward.h"
#include "tile.cuh"
#include "weight_4bit.cuh"

namespace lora_ops {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kStages = 2;
constexpr int kPairs = kCodes * kCodes, kNestedCodes = 256;
constexpr int kCopiesBytes = kWarp * sizeof(uint32_t);  // of one pair
constexpr int kTableBytes = kPairs * kCopiesBytes, kNestedBytes = kNestedCodes * sizeof(float);
constexpr int kTileSums = kMmaM * kGemvRows;
static_assert(kGemvRows == kMmaN && kNestedCodes == kThreads);

template <int kTiles>
constexpr int kSharedBytes = kTableBytes + kNestedBytes + kWarps * kTiles * kTileSums * static_cast<int>(sizeof(float));

struct Args {
  CudaQloraForward p;
  int chunks;      // of a row
  int runs_shift;  // runs per block, as a power of two
  bool adapters_f32, bias_f32;
  float values[kCodes];
};

__device__ __forceinline__ uint32_t at(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Where a lane reads. Rows that do not exist repeat the last: a row of W0 or x makes only its own row or column of D.
template <int kTiles>
struct Source {
  int run[2 * kTiles];  // of rows g + 8 q: run t of the first chunk, counted in the weight, which is also 16 bytes of codes
  int x;                // of x's row g, in 16 bytes

  __device__ __forceinline__ Source(const CudaQloraForward& p, int row0) {
    const int g = lane_id() / 4, t = lane_id() % 4, N = static_cast<int>(p.N);
#pragma unroll
    for (int q = 0; q < 2 * kTiles; ++q) run[q] = min(row0 + g + 8 * q, N - 1) * static_cast<int>(p.K / kWords) + t;
    x = min(g, static_cast<int>(p.M) - 1) * static_cast<int>(p.x.row_stride / kVectorElements) + t;
  }
};

// What a lane has of a chunk.
template <int kTiles, bool kNested>
struct Piece {
  static constexpr int kRows = 2 * kTiles;
  uint4 codes[kRows];
  uint32_t absmax[kRows];  // of run t
  float nested_absmax[kRows];

  __device__ __forceinline__ void load(const Args& args, const Source<kTiles>& from, int chunk) {
    const CudaQuantizedWeight& w = args.p.weight;
#pragma unroll
    for (int q = 0; q < kRows; ++q) {
      const int run = from.run[q] + chunk * kRunsPerChunk, block = run >> args.runs_shift;
      codes[q] = load_streaming(reinterpret_cast<const uint4*>(w.codes) + run);
      if constexpr (kNested) {
        absmax[q] = __ldg(static_cast<const uint8_t*>(w.absmax) + block);
        nested_absmax[q] = __ldg(w.nested_absmax + (block >> kNestedShift));
      } else {
        absmax[q] = __ldg(static_cast<const uint32_t*>(w.absmax) + block);
      }
    }
  }
};

using Columns = uint4[kRunsPerChunk];  // a lane's of a chunk of x

// The columns of a chunk's half; a chunk beyond the last repeats it.
__device__ __forceinline__ void load_half(Columns& x, const Args& args, int row, int chunk, int half) {
  const auto* const from =
      static_cast<const uint4*>(args.p.x.data) + (row + min(chunk, args.chunks - 1) * (kChunk / kVectorElements));
#pragma unroll
  for (int run = 2 * half; run < 2 * half + 2; ++run) x[run] = __ldg(from + run * (kWords / kVectorElements));
}

// acc += x · codes · scale. acc[i] is D of 16 rows: rows g and g + 8 of W0, and 2 t, 2 t + 1 of x.
template <class T, bool kBlocksOf32, int kTiles, bool kNested, class LoadNext>
__device__ __forceinline__ void multiply(float (&acc)[kTiles][4], Columns& x, const Piece<kTiles, kNested>& piece,
                                         uint32_t table, uint32_t nested_code, float offset, LoadNext&& load_next) {
  constexpr int kRows = 2 * kTiles, kSums = kBlocksOf32 ? 2 : 1;
  float scales[kRows];
#pragma unroll
  for (int q = 0; q < kRows; ++q) {
    scales[q] = __uint_as_float(piece.absmax[q]);
    if constexpr (kNested) {
      const float nested = __uint_as_float(load_shared4(nested_code + piece.absmax[q] * sizeof(float)));
      scales[q] = undo_nesting(nested, piece.nested_absmax[q], offset);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum[kTiles][kSums][4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t first = at(x[2 * half], j), second = at(x[2 * half + 1], j);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        uint32_t a[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const uint32_t pair = __byte_perm(at(piece.codes[2 * i + e % 2], j), 0, 0x4440 + half + e / 2 * 2);
          a[e] = load_shared4(table + pair * kCopiesBytes);
        }
        if constexpr (kBlocksOf32) {
          T::mma(sum[i][0], a, first & 0xffff, first >> 16);
          T::mma(sum[i][1], a, second << 16, second & 0xffff0000);
        } else {
          T::mma(sum[i][0], a, __byte_perm(first, second, 0x5410), __byte_perm(first, second, 0x7632));
        }
      }
    }
    load_next(half);
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int q = 0; q < kRows; ++q) {
        const float scale = __shfl_sync(0xffffffff, scales[q], lane_id() / 4 * 4 + 2 * half + s);
#pragma unroll
        for (int e = 0; e < 2; ++e) acc[q / 2][q % 2 * 2 + e] += scale * sum[q / 2][s][q % 2 * 2 + e];
      }
    }
  }
}

// acc = S Bᵀ over every eighth rank, from `warp` on. 16-bit adapters are multiplied by S rounded to their type, as in eager.
template <class T, class Adapter, int kTiles>
__device__ __forceinline__ void low_rank(float (&acc)[kTiles][4], const CudaQloraForward& p, int row, int warp) {
  const int m = fragment_col(lane_id()), M = static_cast<int>(p.M), N = static_cast<int>(p.N);
#pragma unroll 2
  for (int64_t rank = warp; rank < p.r; rank += kWarps) {
    float left[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      left[e] = __ldg(p.S + min(m + e, M - 1) * p.r + rank);
      if constexpr (!std::is_same_v<Adapter, float>) left[e] = to_float(from_float<T>(left[e]));
    }
#pragma unroll
    for (int q = 0; q < 2 * kTiles; ++q) {
      const int64_t column = min(row + 8 * q, N - 1) * p.lora_B.row_stride + rank * p.lora_B.col_stride;
      const float right = to_float(static_cast<const Adapter*>(p.lora_B.data)[column]);
#pragma unroll
      for (int e = 0; e < 2; ++e) acc[q / 2][q % 2 * 2 + e] += left[e] * right;
    }
  }
}

template <class T>
__device__ __forceinline__ float bias_of(const Args& args, int n) {
  const int64_t at = n * args.p.bias.col_stride;
  return args.bias_f32 ? static_cast<const float*>(args.p.bias.data)[at]
                       : to_float(static_cast<const T*>(args.p.bias.data)[at]);
}

// A warp's copies of a pair are neighbours, one wavefront.
template <class T>
__device__ __forceinline__ void fill_table(uint32_t table, uint32_t values) {
  constexpr int kVectors = kCopiesBytes / kVectorBytes, kStep = kThreads / kVectors;
  const int first = threadIdx.x / kVectors;
#pragma unroll
  for (int pair = 0; pair < kPairs; pair += kStep) {
    const auto value = [&](int code) { return __uint_as_float(load_shared4(values + code * sizeof(float))); };
    const uint32_t v = T::pair(value((pair + first) % kCodes), value((pair + first) / kCodes));
    store_shared(table + (pair + first) * kCopiesBytes + threadIdx.x % kVectors * kVectorBytes, uint4{v, v, v, v});
  }
}

// Where D's element of row n and column m lies among a tile's sums, whose columns are in the order 0, 2, 4, 6, 1, 3, 5, 7: 32
// lanes in 32 banks when D is written, and when 32 threads read the 16 rows of two neighbours in that order.
__device__ __forceinline__ int place_of_sum(int n, int m) {
  const int column = m / 2 + m % 2 * 4;
  return column * kMmaM + (n ^ (column & 2) * 4);
}

template <class T, int kTiles, bool kNested, bool kBlocksOf32>
__global__ void __launch_bounds__(kThreads, 2) qlora_gemv_kernel(const __grid_constant__ Args args) {
  const CudaQloraForward& p = args.p;
  const uint32_t table = shared_address(shared_memory()), nested_code = table + kTableBytes, sums = nested_code + kNestedBytes;
  const int lane = lane_id(), warp = threadIdx.x / kWarp;
  const int row0 = blockIdx.x * kTiles * kMmaM, row = row0 + fragment_row(lane);
  const Source<kTiles> from(p, row0);

  Piece<kTiles, kNested> ring[kStages];
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    if (warp + stage * kWarps < args.chunks) ring[stage].load(args, from, warp + stage * kWarps);
  }

  Columns x;
  if (args.chunks > 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) load_half(x, args, from.x, warp, half);
  }
  float offset = 0.f;
  if constexpr (kNested) {
    offset = __ldg(p.weight.offset);
    store_shared(nested_code + threadIdx.x * sizeof(float), __float_as_uint(__ldg(p.weight.nested_code + threadIdx.x)));
  }
  store_values(sums, args.values);
  __syncthreads();
  fill_table<T>(table, sums);

  float acc[kTiles][4] = {};
  if (args.adapters_f32) {
    low_rank<T, float>(acc, p, row, warp);
  } else {
    low_rank<T, T>(acc, p, row, warp);
  }
#pragma unroll
  for (int q = 0; q < 2 * kTiles; ++q) {
    const float bias =
        warp == 0 && p.bias.data != nullptr ? bias_of<T>(args, min(row + 8 * q, static_cast<int>(p.N) - 1)) : 0.f;
#pragma unroll
    for (int e = 0; e < 2; ++e) acc[q / 2][q % 2 * 2 + e] = acc[q / 2][q % 2 * 2 + e] * p.scaling + bias;
  }
  __syncthreads();

#pragma unroll 1
  for (int chunk = warp; chunk < args.chunks; chunk += kStages * kWarps) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      const int now = chunk + stage * kWarps, next = now + kStages * kWarps;
      if (now < args.chunks) {
        multiply<T, kBlocksOf32>(acc, x, ring[stage], table + lane * sizeof(uint32_t), nested_code, offset,
                                 [&](int half) { load_half(x, args, from.x, now + kWarps, half); });
      }
      if (next < args.chunks) ring[stage].load(args, from, next);
    }
  }

#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int place = place_of_sum(fragment_row(lane) + e / 2 * 8, fragment_col(lane) + e % 2);
      store_shared(sums + ((warp * kTiles + i) * kTileSums + place) * sizeof(float), __float_as_uint(acc[i][e]));
    }
  }
  __syncthreads();
  const int out_n = threadIdx.x % kMmaM + threadIdx.x / kTileSums * kMmaM, column = threadIdx.x / kMmaM % kGemvRows;
  const int out_m = column % 4 * 2 + column / 4;
  if (threadIdx.x >= kTiles * kTileSums || out_m >= p.M || row0 + out_n >= p.N) return;
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const int place = (w * kTiles + out_n / kMmaM) * kTileSums + place_of_sum(out_n % kMmaM, out_m);
    sum += __uint_as_float(load_shared4(sums + place * sizeof(float)));
  }
  static_cast<T*>(p.y.data)[out_m * p.y.row_stride + row0 + out_n] = from_float<T>(sum);
}

template <class T, int kTiles, bool kNested, bool kBlocksOf32>
void launch_tiles(const Args& args, void* stream, const std::string& sizes) {
  const dim3 grid(static_cast<unsigned>((args.p.N + kTiles * kMmaM - 1) / (kTiles * kMmaM)));
  launch("qlora_gemv", qlora_gemv_kernel<T, kTiles, kNested, kBlocksOf32>, grid, kThreads, kSharedBytes<kTiles>, stream, args,
         sizes);
}

template <class T, bool kNested>
void launch_nested(const Args& args, void* stream, const std::string& sizes) {
  // With 32 rows, half as many blocks fill their table and read x, where about a block per multiprocessor is left. Twice the
  // sums of blocks of 32 would not fit the registers.
  constexpr int64_t kRowsToFill = 4096;
  if (args.p.weight.blocksize == kWords) {
    launch_tiles<T, 1, kNested, true>(args, stream, sizes);
  } else if (args.p.N < kRowsToFill) {
    launch_tiles<T, 1, kNested, false>(args, stream, sizes);
  } else {
    launch_tiles<T, 2, kNested, false>(args, stream, sizes);
  }
}

template <class T>
void launch_typed(const Args& args, void* stream, const std::string& sizes) {
  if (args.p.weight.nested_code != nullptr) {
    launch_nested<T, true>(args, stream, sizes);
  } else {
    launch_nested<T, false>(args, stream, sizes);
  }
}

}  // namespace

void launch_qlora_gemv(const CudaQloraForward& p, void* stream) {
  const char* name = "qlora_gemv";
  const std::string sizes = shapes("M", p.M, "K", p.K, "N", p.N, "r", p.r);
  require(p.M >= 1 && p.M <= kGemvRows, name, "M is 1 to 8", sizes);
  require(std::max(p.K, p.N) <= 1 << 30, name, "a size is beyond 2^30", sizes);
  require(p.K % kChunk == 0, name, "K is a multiple of 128", sizes);
  require(p.y.dtype != DType::f32 && p.x.dtype == p.y.dtype, name, "takes bf16 or fp16, and one of them", sizes);
  require(p.lora_B.dtype == DType::f32 || p.lora_B.dtype == p.y.dtype, name, "adapters are fp32 or of the input's type", sizes);
  require(p.bias.data == nullptr || p.bias.dtype == DType::f32 || p.bias.dtype == p.y.dtype, name,
          "the bias is fp32 or of the input's type", sizes);
  require(p.x.col_stride == 1 && p.y.col_stride == 1, name, "rows are contiguous", sizes);
  require(reinterpret_cast<uintptr_t>(p.x.data) % kVectorBytes == 0 && p.x.row_stride % kVectorElements == 0, name,
          "rows begin at multiples of 16 bytes", sizes);
  require(reinterpret_cast<uintptr_t>(p.weight.codes) % kVectorBytes == 0, name, "codes begin at a multiple of 16 bytes",
          sizes);
  require(p.N * (p.K / kWords) <= INT_MAX, name, "too many weights", sizes);
  require(p.M * p.x.row_stride <= INT_MAX, name, "rows of x are too far apart", sizes);
  constexpr int kRunShift = 5;
  static_assert(1 << kRunShift == kWords);
  Args args{};
  args.p = p;
  args.chunks = static_cast<int>(p.K / kChunk);
  args.runs_shift = shift_of(name, p.weight.blocksize, sizes) - kRunShift;
  args.adapters_f32 = p.lora_B.dtype == DType::f32;
  args.bias_f32 = p.bias.dtype == DType::f32;
  std::copy_n(code_table(p.weight.quant_type).values, kCodes, args.values);
  if (p.y.dtype == DType::bf16) {
    launch_typed<Bf16>(args, stream, sizes);
  } else {
    launch_typed<Half>(args, stream, sizes);
  }
}

}  // namespace lora_ops
