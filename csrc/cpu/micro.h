// The micro-kernels, written once over a vector type. Each ISA file includes this inside its `#pragma GCC target` region
// and its own namespace (no include guard: that is the point), after defining
//
//     struct V { T, kLanes, kRows, kShortestChain; zero load store broadcast add fma; pin (to a register);
//                keep (lanes whose bit is set), keep_bit (lanes in whose word that bit is set);
//                load_bf16 load_f16 store_bf16 store_f16;
//                load_transposed (kLanes x kLanes dwords); sums (lane i of the result: all lanes of vector i added up);
//                kPairs, and if so split (dwords of two bf16 into even and odd elements);
//                kFewRows, kFetchedFrom (see dots.h);
//                U and the dropout generator's integer steps }
//
// Tile budget: kRows x 2 accumulators + 2 panel vectors + 1 broadcast fill the register file (14 x 2 + 3 = 31 of 32 with
// AVX-512, 6 x 2 + 3 = 15 of 16 with AVX2). Two panel vectors and kRows broadcasts per 2·kRows multiply-adds keep the load
// ports below the arithmetic ports, and the panel, which streams from L2, moves 2 vectors per kRows cycles.

constexpr int kLanes = V::kLanes;
constexpr int kPanel = 2 * kLanes;
// Steps between two flushes of the accumulators into c: the rounding error grows with the root of a chain's length. Long
// reductions can afford long chains; short ones are held against libraries that sum them in many lanes.
constexpr int64_t kLongestChain = 256;
constexpr int kAhead = 32;  // steps that the panel and the left operand are prefetched ahead
// Rows that packing prefetches ahead, into L2, which has more misses under way than L1: it reads so little of each that no
// hardware prefetcher gets going.
constexpr int64_t kFetchedRows = 16;
static_assert(V::kRows <= kLanes, "a left operand's rows fit one vector");

struct F32 {
  static typename V::T multiply_add(typename V::T a, typename V::T b, typename V::T c) { return V::fma(a, b, c); }
};

template <DType kType>
typename V::T load_as(const void* row, int64_t i) {
  if constexpr (kType == DType::f32) return V::load(static_cast<const float*>(row) + i);
  if constexpr (kType == DType::bf16) return V::load_bf16(static_cast<const uint16_t*>(row) + i);
  if constexpr (kType == DType::f16) return V::load_f16(static_cast<const uint16_t*>(row) + i);
}

// A tile's right operand: packed, or rows of two vectors where they lie, widened as they are loaded.
struct Panel {
  const float* panel;
  int64_t vector_stride;
  typename V::T load(int v) const {
    __builtin_prefetch(panel + v * vector_stride + kAhead * kLanes);
    return V::load(panel + v * vector_stride);
  }
  void next() { panel += kLanes; }
};
template <DType kType>
struct InPlace {
  const char* row;
  int64_t stride;  // bytes
  typename V::T load(int v) const {
    const int64_t at = v * kLanes * size_of(kType);
    if (at % 64 == 0) __builtin_prefetch(row + kFetchedRows * stride + at);
    return load_as<kType>(row, v * kLanes);
  }
  void next() { row += stride; }
};

template <class Op, int kTileRows, int kVectors, class Right>
void tile_of(const Tail* tail, const float* left, Right right, int64_t steps, float* c, bool accumulate, const Ahead& ahead) {
  using T = typename V::T;
  const int64_t eighth = steps / 8 < kLongestChain ? steps / 8 : kLongestChain;
  const int64_t flush = eighth < V::kShortestChain ? V::kShortestChain : eighth;
  // Without anything ahead, what is near already costs a load slot, nothing else.
  const char* const near = reinterpret_cast<const char*>(left);
  const char* fetched = ahead.right ? ahead.right : near;
  const char* piece = ahead.pieces[0] ? ahead.pieces[0] : near;
  const char* piece_then = ahead.pieces[1] ? ahead.pieces[1] : near;
  do {
    const int64_t block = steps < flush ? steps : flush;
    T acc[kTileRows][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] = V::zero();
    for (int64_t s = 0; s < block; ++s) {
      T b[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) b[v] = right.load(v);
      __builtin_prefetch(left + kAhead * kLanes);
      __builtin_prefetch(fetched, 0, 2);
      fetched += ahead.right_step;
      __builtin_prefetch(piece, 0, 2);
      const char* const next = piece + ahead.pieces_step;
      piece = piece_then;
      piece_then = next;
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        const T a = V::broadcast(left + i);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) acc[i][v] = Op::multiply_add(a, b[v], acc[i][v]);
      }
      right.next();
      left += kLanes;
    }
    if (kVectors == 2 && tail) {  // behind the first chain: before it, each of its sums would be rounded at the tail's size
      const float *tail_left = tail->left, *tail_right = tail->right;
      for (int64_t s = 0; s < tail->steps; ++s, tail_left += kLanes, tail_right += kLanes) {
        const T b[2] = {V::load(tail_right), V::load(tail_right + tail->steps * kLanes)};
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows; ++i) {
          const T a = V::broadcast(tail_left + i);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) acc[i][v] = V::fma(a, b[v], acc[i][v]);
        }
      }
      tail = nullptr;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* to = c + i * kPanel + v * kLanes;
        V::store(to, accumulate ? V::add(acc[i][v], V::load(to)) : acc[i][v]);
      }
    accumulate = true;
    steps -= block;
  } while (steps > 0);
}

template <class Op, int kTileRows = V::kRows>
void tile(int rows, int vectors, const float* left, const float* panel, int64_t vector_stride, int64_t steps, float* c,
          bool accumulate, const Ahead& ahead) {
  if constexpr (kTileRows > 0) {
    if (rows != kTileRows) {
      return tile<Op, kTileRows - 1>(rows, vectors, left, panel, vector_stride, steps, c, accumulate, ahead);
    }
    const Panel right{panel, vector_stride};
    vectors == 1 ? tile_of<Op, kTileRows, 1>(nullptr, left, right, steps, c, accumulate, ahead)
                 : tile_of<Op, kTileRows, 2>(nullptr, left, right, steps, c, accumulate, ahead);
  }
}

template <class Op, int kTileRows = V::kRows>
void tile_with_tail(int rows, const Tail& tail, const float* left, const float* panel, int64_t vector_stride, int64_t steps,
                    float* c, const Ahead& ahead) {
  if constexpr (kTileRows > 0) {
    if (rows != kTileRows) {
      return tile_with_tail<Op, kTileRows - 1>(rows, tail, left, panel, vector_stride, steps, c, ahead);
    }
    tile_of<Op, kTileRows, 2>(&tail, left, Panel{panel, vector_stride}, steps, c, false, ahead);
  }
}

#define LORA_OPS_BY_DTYPE(dtype, function, ...)  \
  switch (dtype) {                               \
    case DType::f32:                             \
      return function<DType::f32>(__VA_ARGS__);  \
    case DType::bf16:                            \
      return function<DType::bf16>(__VA_ARGS__); \
    case DType::f16:                             \
      return function<DType::f16>(__VA_ARGS__);  \
  }

template <DType kType, int kTileRows = V::kRows>
void tile_in_place_as(int rows, const float* left, const Matrix& right, int64_t steps, float* c, bool accumulate) {
  if constexpr (kTileRows > 0) {
    if (rows != kTileRows) return tile_in_place_as<kType, kTileRows - 1>(rows, left, right, steps, c, accumulate);
    const InPlace<kType> rows_of{right.at(0, 0), right.row_stride * size_of(kType)};
    tile_of<F32, kTileRows, 2>(nullptr, left, rows_of, steps, c, accumulate, kNothingAhead);
  }
}

inline void tile_in_place(int rows, const float* left, const Matrix& right, int64_t steps, float* c, bool accumulate) {
  LORA_OPS_BY_DTYPE(right.dtype, tile_in_place_as, rows, left, right, steps, c, accumulate)
}

// `count` < kLanes elements, the rest zero: nothing behind the row is read.
template <DType kType>
typename V::T load_part(const void* row, int64_t i, int64_t count) {
  alignas(64) char part[kLanes * 4] = {};
  std::memcpy(part, static_cast<const char*>(row) + i * size_of(kType), count * size_of(kType));
  return load_as<kType>(part, 0);
}

template <DType kType>
void pack_transposed_as(const Matrix& src, int rows, int64_t k, float* out) {
  const char* row = src.at(0, 0);
  const int64_t stride = src.row_stride * size_of(kType);
  const bool whole = rows == kLanes;
  typename V::T v[kLanes];
  int64_t k0 = 0;
  if (kType == DType::f32 && whole) {
    for (; k0 + kLanes <= k; k0 += kLanes) {
      V::load_transposed(row + k0 * 4, stride, v);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) V::store(out + (k0 + j) * kLanes, v[j]);
    }
  }
  if constexpr (kType == DType::bf16 && V::kPairs) {
    for (; whole && k0 + kPanel <= k; k0 += kPanel) {  // pairs are transposed as dwords, then split
      V::load_transposed(row + k0 * 2, stride, v);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        typename V::T even, odd;
        V::split(v[j], even, odd);
        V::store(out + (k0 + 2 * j) * kLanes, even);
        V::store(out + (k0 + 2 * j + 1) * kLanes, odd);
      }
    }
  }
  if (k0 == k) return;
  alignas(64) float wide[kLanes][kLanes] = {};
  for (; k0 < k; k0 += kLanes) {  // whatever needs more than a transposition goes through a widened copy
    const int64_t count = k - k0 < kLanes ? k - k0 : kLanes;
    for (int i = 0; i < rows; ++i) {
      V::store(wide[i], count == kLanes ? load_as<kType>(row + i * stride, k0) : load_part<kType>(row + i * stride, k0, count));
    }
    V::load_transposed(reinterpret_cast<const char*>(wide), sizeof wide[0], v);
    for (int j = 0; j < count; ++j) V::store(out + (k0 + j) * kLanes, v[j]);
  }
}

template <DType kType>
void pack_straight_as(const Matrix& src, int64_t cols, int64_t k, Mask mask, float* out, int vectors, int64_t vector_stride) {
  const char* row = src.at(0, 0);
  const int64_t stride = src.row_stride * size_of(kType);
  const bool whole = cols == int64_t{vectors} * kLanes;
  for (int64_t s = 0; s < k; ++s, row += stride, out += kLanes) {
    if (whole) {
      const char* fetched = row + kFetchedRows * stride;
      for (int v = 0; v < vectors; ++v) {
        const auto x = load_as<kType>(row, v * kLanes);
        __builtin_prefetch(fetched + v * kLanes * size_of(kType), 0, 2);
        V::store(out + v * vector_stride, mask.words ? V::keep(x, mask.bits(s, v * kLanes)) : x);
      }
      continue;
    }
    for (int v = 0; v < vectors; ++v) {
      const int64_t j = v * kLanes, count = cols - j;
      typename V::T x = count >= kLanes ? load_as<kType>(row, j) : count > 0 ? load_part<kType>(row, j, count) : V::zero();
      if (mask.words && count > 0) x = V::keep(x, mask.bits(s, j));
      V::store(out + v * vector_stride, x);
    }
  }
}

inline void pack_transposed(const Matrix& src, int rows, int64_t k, float* out) {
  LORA_OPS_BY_DTYPE(src.dtype, pack_transposed_as, src, rows, k, out)
}

inline void pack_straight(const Matrix& src, int64_t cols, int64_t k, Mask mask, float* out, int vectors,
                          int64_t vector_stride) {
  LORA_OPS_BY_DTYPE(src.dtype, pack_straight_as, src, cols, k, mask, out, vectors, vector_stride)
}

// `cols` <= kPanel neighbouring elements of a row, widened, the rest of kPanel zero.
inline void widen_row(const Matrix& row, int64_t cols, Mask mask, float* out) {
  pack_straight(row, cols, 1, mask, out, 2, kLanes);
}

// --- a tile's way in and out -----------------------------------------------------------------------------------------

template <DType kType>
void store_as(void* to, int64_t i, typename V::T v) {
  if constexpr (kType == DType::f32) V::store(static_cast<float*>(to) + i, v);
  if constexpr (kType == DType::bf16) V::store_bf16(static_cast<uint16_t*>(to) + i, v);
  if constexpr (kType == DType::f16) V::store_f16(static_cast<uint16_t*>(to) + i, v);
}

template <DType kType>
void store_tile_as(const float* c, int rows, int cols, const float* bias, const Matrix& y) {
  for (int i = 0; i < rows; ++i, c += kPanel) {
    const auto v0 = V::add(V::load(c), V::load(bias)), v1 = V::add(V::load(c + kLanes), V::load(bias + kLanes));
    alignas(64) char part[kPanel * 4];
    char* to = cols == kPanel ? y.at(i, 0) : part;
    store_as<kType>(to, 0, v0);
    store_as<kType>(to, kLanes, v1);
    if (cols != kPanel) std::memcpy(y.at(i, 0), part, cols * size_of(kType));
  }
}

inline void store_tile(const float* c, int rows, int cols, const Matrix& bias, const Matrix& y) {
  alignas(64) float wide[kPanel] = {};
  if (bias.data) widen_row(bias, cols, Mask{}, wide);
  LORA_OPS_BY_DTYPE(y.dtype, store_tile_as, c, rows, cols, wide, y)
}

inline void load_tile(const Matrix& y, int rows, int cols, float* c) {
  alignas(64) float wide[kPanel];
  for (int i = 0; i < rows; ++i, c += kPanel) {
    widen_row(Matrix{y.at(i, 0), 0, 1, y.dtype}, cols, Mask{}, wide);
    for (int j = 0; j < kPanel; j += kLanes) V::store(c + j, V::add(V::load(c + j), V::load(wide + j)));
  }
}

inline void mask_left(float* tile, int rows, int64_t k, Mask mask) {
  for (int64_t k0 = 0; k0 < k; k0 += 32, tile += 32 * kLanes) {
    alignas(64) uint32_t words[kLanes] = {};
    for (int i = 0; i < rows; ++i) words[i] = mask.bits(i, k0);
    for (int j = 0; j < 32 && k0 + j < k; ++j) V::store(tile + j * kLanes, V::keep_bit(V::load(tile + j * kLanes), words, j));
  }
}

inline void mask_tile(float* c, int rows, Mask mask) {
  for (int i = 0; i < rows; ++i, c += kPanel)
    for (int j = 0; j < kPanel; j += kLanes) V::store(c + j, V::keep(V::load(c + j), mask.bits(i, j)));
}

// --- dropout ---------------------------------------------------------------------------------------------------------

inline void dropout_mask(const Dropout& dropout, int64_t row, int64_t cols, uint32_t* words) {
  using U = typename V::U;
  for (int64_t g = 0; g * kDropoutGroup < cols; ++g, words += kDropoutWords) {
    uint32_t word[kDropoutWords] = {};
    for (int l = 0; l < kDropoutCounters; l += V::kCounters) {
      U c0 = V::iota(static_cast<uint32_t>(kDropoutCounters * g + l)), c1 = V::set(static_cast<uint32_t>(row));
      U c2 = V::set(static_cast<uint32_t>(row >> 32)), c3 = V::set(0);
      uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
#pragma GCC unroll 10
      for (int round = 0; round < kPhiloxRounds; ++round) {
        U hi0, lo0, hi1, lo1;
        V::multiply(c0, kPhiloxM0, hi0, lo0);
        V::multiply(c2, kPhiloxM1, hi1, lo1);
        c0 = V::exclusive_or(hi1, c1, V::set(k0));
        c1 = lo1;
        c2 = V::exclusive_or(hi0, c3, V::set(k1));
        c3 = lo0;
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
      }
      word[0] |= V::at_least(c0, dropout.threshold) << (2 * l);
      word[1] |= V::at_least(c1, dropout.threshold) << (2 * l);
      word[2] |= V::at_least(c2, dropout.threshold) << (2 * l);
      word[3] |= V::at_least(c3, dropout.threshold) << (2 * l);
    }
    for (int w = 0; w < kDropoutWords; ++w) words[w] = word[w];
  }
}

#include "bounds.h"
#include "dots.h"
#include "four_bit.h"
#include "out_scale.h"

constexpr Arithmetic kF32 = {V::kRows,
                             1,
                             1,
                             {},
                             nullptr,
                             nullptr,
                             pack_transposed,
                             pack_transposed,
                             pack_straight,
                             tile<F32>,
                             tile_with_tail<F32>,
                             multiply_adds<F32>};

constexpr Kernels table(const char* name, Arithmetic bf16) {
  return {name,
          kLanes,
          V::kFewRows,
          kF32,
          bf16,
          dot,
          dot_order,
          dot_short,
          {dot_codes, dot_order_codes},
          {},
          {},
          V::kFewRows,
          decode,
          tile_in_place,
          store_tile,
          load_tile,
          mask_left,
          mask_tile,
          scale_tile,
          scale_row,
          column_dots,
          dropout_mask,
          read_all,
          nullptr,
          nullptr};
}
