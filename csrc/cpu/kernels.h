// The table of micro-kernels that every ISA file fills: all that the blocking (gemm.h, lora_forward.cpp,
// lora_backward.cpp) knows of an instruction set.
//
// A product C (M, N) = L (M, K) · R (K, N) is computed in tiles of at most `rows` x 2·`lanes`. Both operands are packed:
//
//     left   [step][lanes]       one tile's rows, reduction index outermost, rows padded to a vector (AMX: amx.cpp)
//     panel  [2][step][lanes]    2·lanes neighbouring columns of R, one vector after the other: each a stream that is
//                                written and read in order
//     c      [row][2 * lanes]    the tile's fp32 result
//
// so that a step is two vector loads, `rows` broadcasts and 2·`rows` fused multiply-adds. A step is one k in fp32
// arithmetic and two neighbouring k (one dword of bf16) in bf16 arithmetic. Accumulators are fp32 either way.
#pragma once

#include <cstdint>

#include "../params.h"

namespace lora_ops {

constexpr int kMaxLanes = 16;
constexpr int kMaxTile = 32 * 2 * kMaxLanes;  // floats of the largest tile
constexpr int kDotRows = 8;                   // most left rows of one `dot`
constexpr int kMostDecoded = 512;             // most weights of one `decode`

// Dropout's mask beside a matrix: bit c % 32 of word c / 32 of a row says that column c is kept (philox.h). The matrix's
// column j is the mask's column `first` + j. `words` null: everything is kept. What is not is multiplied by zero, as torch's
// dropout does: NaN and infinities show.
struct Mask {
  const uint32_t* words = nullptr;
  int64_t row_stride = 0;
  int64_t first = 0;

  uint32_t bits(int64_t row, int64_t col) const {  // column `col` and its right neighbours, up to the word's end
    const uint32_t* word = words + row * row_stride + (first + col) / 32;
    return *word >> ((first + col) % 32);
  }
};

// Memory that a tile brings to L2 as it goes, so many bytes further at each step, for whoever comes next. Passed by reference:
// a copy of fields just written one by one waits until they are in L1.
struct Ahead {
  const char* right = nullptr;  // of the right operand: kept panels, or the weight that will be packed
  int64_t right_step = 0;
  const char* pieces[2] = {};  // two pieces elsewhere, in turn
  int64_t pieces_step = 0;
  const char* left = nullptr;  // for arithmetic that outruns the path from L3
  int64_t left_step = 0;
};
inline constexpr Ahead kNothingAhead = {};

// More steps, in fp32, that a tile takes in the same accumulators: left [step][lanes], right [2][step][lanes].
struct Tail {
  const float* left;
  const float* right;
  int64_t steps;
};

// Most steps of a block of the reduction, panels of a group, and rows of M at a time (gemm.h). 0: what the caches suggest.
struct Blocking {
  int64_t steps, group, rows;
};

// How one element type of L and R is packed and multiplied: fp32 arithmetic on widened elements, or bf16 pairs.
struct Arithmetic {
  int rows;        // most rows of a tile
  int k_per_step;  // neighbouring k of a step
  int multiple;    // packed operands are padded with zeros to a multiple of this many steps
  Blocking blocking;
  // What a thread does before and after its tiles, or null.
  void (*begin)();
  void (*end)();
  // left: `rows` <= lanes · ceil(this->rows / lanes) rows, contiguous along the reduction
  void (*pack_left)(const Matrix& src, int rows, int64_t k, float* out);
  // out[step][i] = src[i][step]: `rows` <= lanes rows, contiguous along the reduction; beyond them, zero
  void (*pack_transposed)(const Matrix& src, int rows, int64_t k, float* out);
  // out[v * vector_stride + step * lanes + j] = src[step][v * lanes + j]: `cols` columns, contiguous; beyond them, zero
  void (*pack_straight)(const Matrix& src, int64_t cols, int64_t k, Mask mask, float* out, int vectors, int64_t vector_stride);
  // c[i][j] (+)= Σ_step left[step][i] · panel[step][j], over one or two vectors of columns, vector_stride apart
  void (*tile)(int rows, int vectors, const float* left, const float* panel, int64_t vector_stride, int64_t steps, float* c,
               bool accumulate, const Ahead& ahead);
  // c = the tail + Σ_step left[step][i] · panel[step][j], two vectors of columns; or null
  void (*tile_with_tail)(int rows, const Tail& tail, const float* left, const float* panel, int64_t vector_stride,
                         int64_t steps, float* c, const Ahead& ahead);
  // `iterations` steps of a whole tile on registers alone: the bench's 100 %
  float (*multiply_adds)(int64_t iterations);
  // A packed left tile of k as fp32's pack_left has it, where fp32's tiles have as many rows; or null. The tile itself is
  // multiplied by `scale`, one for every k, if there is one.
  void (*widen_left)(float* tile, int64_t k, const float* scale, float* out) = nullptr;
  // pack_transposed of what `decode` gives, for a 4-bit weight with K of 32; or null
  void (*decode_transposed)(const QuantizedWeight& w, int64_t row, int rows, int64_t k0, int64_t k, float* out) = nullptr;
};

// `dot` with rows `row` and on of a 4-bit weight, columns [k0, k0 + k), k0 a multiple of 128, K of 32. `left` is in `order`,
// whole chunks of 128.
struct DotCodes {
  void (*dot)(int rows, const float* left, int64_t left_stride, const QuantizedWeight& w, int64_t row, int cols, int64_t k0,
              int64_t k, float* c);
  void (*order)(const Matrix& src, int64_t k, Mask mask, float* out);
  int element = sizeof(float);  // bytes of an element in `order`
};

// Most rows of x for which rows of the weight are dot products: for more, packing it pays (crossovers measured).
struct FewRows {
  int dense, panels, codes;  // a weight as it is, in kept panels, in 4 bits
  int rounded = 0;           // of those in 4 bits, with values rounded to bf16
};

// `dot` where x and the weight are in bf16, without widening x: `left` is bf16 in `order`, rows left_stride floats apart.
// `next` is what is read after right, if that does not lie behind it.
struct DotPairs {
  void (*dot)(int rows, const float* left, int64_t left_stride, const Matrix& right, int cols, int64_t k, float* c,
              const char* next);
  void (*order)(const Matrix& src, int64_t k, Mask mask, float* out);
};

struct Kernels {
  const char* name;
  int lanes;  // fp32 lanes of a vector
  FewRows few_rows;
  Arithmetic f32;
  Arithmetic bf16;  // tile null: this ISA has no bf16 product, f32 serves
  // c[i][j] += Σ_k left[i][k] · right[j][k] for `rows` <= kDotRows and `cols` <= 2·lanes, straight from the right operand's
  // rows. `left` is fp32 in the order that `dot_order` gives for right's element type, zero-padded to 2·lanes; it and c have
  // room for `rows` rounded up to a power of two.
  void (*dot)(int rows, const float* left, int64_t left_stride, const Matrix& right, int cols, int64_t k, float* c);
  void (*dot_order)(const Matrix& src, int64_t k, Mask mask, DType right, float* out);
  // c[j] = Σ_k left[k] · right[j][k] for one left row in fp32, zero-padded to whole vectors, a k of some vectors and `cols` <=
  // 2·lanes; c is written in whole vectors. Rows of k are pieces too small for any prefetcher: what is read next lies `ahead`
  // bytes on, and is fetched.
  void (*dot_short)(const float* left, const Matrix& right, int cols, int64_t k, float* c, int64_t ahead);
  DotCodes codes;
  // Where x (and a dense weight) is in bf16, or null; 4-bit weights rounded to bf16.
  DotPairs pairs;
  DotCodes codes_bf16;
  FewRows few_rows_bf16;
  // Columns [k0, k0 + k) of a row of a 4-bit weight as fp32 or bf16, k0 a multiple of 128, k <= kMostDecoded: groups of 32,
  // `group_stride` bytes apart, whole ones.
  void (*decode)(const QuantizedWeight& w, int64_t row, int64_t k0, int64_t k, DType to, char* out, int64_t group_stride);
  // f32.tile over two vectors of right's columns where they lie, contiguous
  void (*tile_in_place)(int rows, const float* left, const Matrix& right, int64_t steps, float* c, bool accumulate);
  // y[i][j] = c[i][j] + bias[j], rounded once to y's type
  void (*store_tile)(const float* c, int rows, int cols, const Matrix& bias, const Matrix& y);
  // c[i][j] (+)= y[i][j]
  void (*load_tile)(const Matrix& y, int rows, int cols, float* c);
  // tile[step][i] = 0 where element (i, step) of fp32's packed left tile is dropped
  void (*mask_left)(float* tile, int rows, int64_t k, Mask mask);
  // c[i][j] = 0 where element (i, j) is dropped
  void (*mask_tile)(float* c, int rows, Mask mask);
  // c[i][j] *= scale[j], a panel's columns
  void (*scale_tile)(float* c, int rows, const float* scale);
  // out[j] = row[j] · scale[j], `cols` contiguous elements; out has row's type, or fp32
  void (*scale_row)(const Matrix& row, int64_t cols, const float* scale, const Matrix& out);
  // sums[j] += Σ_i a[i][j] · b[i][j], `cols` contiguous elements; b has a's type, or fp32; sums: whole vectors
  void (*column_dots)(const Matrix& a, const Matrix& b, int64_t rows, int64_t cols, float* sums);
  void (*dropout_mask)(const Dropout& dropout, int64_t row, int64_t cols, uint32_t* words);
  float (*read_all)(const float* p, int64_t count);  // reads `count` floats in order: the bench's bandwidth

  // products[panel of M][strip's row][panel] = rows [row, row + rows) of a bf16 or 4-bit weight, at most a panel's width, times
  // x in bf16's panels [panel of M][2][vector_stride]; K a multiple of 32. Null where dot products are as good.
  void (*strip)(const Matrix& weight, const QuantizedWeight& quantized, int64_t K, int64_t row, int rows, const float* x_panels,
                int64_t vector_stride, int64_t M, float* products, char* scratch);
  int64_t (*strip_scratch)(int64_t K);  // bytes

  int panel() const { return 2 * lanes; }
};

extern const Kernels kGeneric;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;
extern const Kernels kAmx;
#endif

}  // namespace lora_ops
