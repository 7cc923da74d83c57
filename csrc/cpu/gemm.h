// Blocking and threading of a product with a low-rank tail, written once for every ISA and for both directions:
//
//     out (M, C) = left (M, R) · right (R, C)  +  tail_left (M, r) · tail_right (r, C)  + bias
//
// The rows of a block of M are packed once into tiles (kernels.h) and stay in L2/L3. Then, group by group of columns, the
// right operand is packed into panels that fit half of L2, and every tile of the block runs over the group: a weight is
// read from memory once per block of M and every packed panel is used by all its rows.
#pragma once

#include <algorithm>

#include "../philox.h"
#include "kernels.h"
#include "threads.h"
#include "workspace.h"

namespace lora_ops {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// `total` cut into the fewest parts of at most `most`, their sizes differing by at most one.
struct Parts {
  int64_t total, count;
  Parts(int64_t total_, int64_t most) : total(total_), count(std::max<int64_t>(1, ceil_div(total_, most))) {}
  int64_t start(int64_t i) const { return i * (total / count) + std::min(i, total % count); }
  int64_t size(int64_t i) const { return total / count + (i < total % count ? 1 : 0); }
};

// Steps of a reduction of length R, and the floats packed over it: of one of the two vectors of a panel, and of a left tile,
// which has as many vectors as its rows need.
struct Steps {
  int64_t count, vector, left;
  Steps(const Kernels& k, const Arithmetic& arithmetic, int64_t R)
      : count(ceil_div(ceil_div(R, arithmetic.k_per_step), arithmetic.multiple) * arithmetic.multiple),
        vector(count * k.lanes),
        left(vector * left_vectors(k, arithmetic)) {}

  static int64_t left_vectors(const Kernels& k, const Arithmetic& arithmetic) { return ceil_div(arithmetic.rows, k.lanes); }
};

// The low-rank factors are multiplied in fp32, whose tiles may have fewer rows than the product's: body(row, rows) for each of
// them. None reaches over a vector's end.
template <class F>
void each_f32_tile(const Kernels& k, int64_t rows, const F& body) {
  for (int64_t v = 0; v < rows; v += k.lanes) {
    const int64_t here = std::min<int64_t>(k.lanes, rows - v);
    if (here <= k.f32.rows) {  // mostly, and Parts divides
      body(v, static_cast<int>(here));
      continue;
    }
    const Parts parts(here, k.f32.rows);
    for (int64_t i = 0; i < parts.count; ++i) body(v + parts.start(i), static_cast<int>(parts.size(i)));
  }
}

inline int64_t mask_words(int64_t cols) {
  return ceil_div(cols, kDropoutGroup) * kDropoutWords;
}

const Arithmetic& arithmetic_of(const Kernels& k, DType left, DType right);

// Most rows of a block of M.
int64_t block_rows(const Arithmetic& arithmetic, const Steps& steps);

// Threads worth waking for this many multiply-adds.
int useful_threads(int threads, int64_t multiply_adds);

// From one packed vector of columns to the next, in floats: a line more than it takes. Vectors are written side by side, and at
// multiples of 4 KB they would share one set of L1.
constexpr int64_t padded_vector(int64_t floats) {
  return floats + 16;
}

// Packs `vectors` vectors of columns of right (R, C) from column j on, rows [k0, k0 + count). `mask` is of rows that are
// contiguous.
void pack_right(const Kernels& k, const Arithmetic& arithmetic, const Matrix& right, int64_t C, int64_t j, int vectors,
                int64_t k0, int64_t count, Mask mask, float* out, int64_t vector_stride);

// The same from a 4-bit weight, decoded piece by piece into `buffer` (kDecodeBytes) on the way: right is the weight (N, K), or
// its transpose.
void pack_quantized(const Kernels& k, const Arithmetic& arithmetic, const QuantizedWeight& weight, bool transpose, int64_t C,
                    int64_t j, int vectors, int64_t k0, int64_t count, float* out, int64_t vector_stride, void* buffer);
constexpr int64_t kDecodeRows = 32, kDecodeStride = kMostDecoded + 16;  // not a power of two: rows would share a set of L1
constexpr int64_t kDecodeBytes = kDecodeRows * kDecodeStride * 4;
static_assert(kDecodeRows >= kMaxLanes, "as many rows as pack_transposed takes");

// Packs the whole of right (R, C) into panels to keep (Product::panels).
void pack_kept(const Kernels& k, const Arithmetic& arithmetic, const Matrix& right, int64_t R, int64_t C, float* panels,
               int threads);

// Packs a tile of left (M, R) that begins at row i. Where M goes on behind the tile the vector is filled with what follows:
// lanes beyond the tile's rows are never used, and a full vector packs fastest.
void pack_left(const Kernels& k, const Arithmetic& arithmetic, const Matrix& left, int64_t M, int64_t i, int64_t R, float* out);

inline Matrix transposed(const Matrix& m) {
  return {m.data, m.col_stride, m.row_stride, m.dtype};
}
inline Matrix from(const Matrix& m, int64_t row, int64_t col) {
  return {m.at(row, col), m.row_stride, m.col_stride, m.dtype};
}

// out[j][i] = scale · sums[i][j], `rows` x `cols` <= a panel's columns
void store_transposed(const Kernels& k, const float* sums, int64_t rows, int cols, float scale, const Matrix& out);

// A factor of rank r packed for both of its uses as a right operand: reduced over its long side ("down", to r columns) or
// over r ("up", the tail of a product).
struct DownPanels {  // right (R, r)
  const Kernels& k;
  int64_t R, r;
  float* data;
  DownPanels(const Kernels& k_, int64_t R_, int64_t r_, Workspace& w)
      : k(k_), R(R_), r(r_), data(w.floats(ceil_div(r_, k_.lanes) * R_ * k_.lanes)) {}
  int64_t tasks() const { return ceil_div(R, kChunk); }
  void pack(const Matrix& right, int64_t task) const;
  // right's rows, packed, times scale (R)
  void scale(const float* scale, int64_t task) const;
  // c = left · columns [j, j + panel), from a packed fp32 tile
  void multiply(const float* left, int rows, int64_t j, float* c) const;

  static constexpr int64_t kChunk = 512;
};
struct UpPanels {  // right (r, C)
  const Kernels& k;
  int64_t r, C;
  float* data;
  UpPanels(const Kernels& k_, int64_t r_, int64_t C_, Workspace& w)
      : k(k_), r(r_), C(C_), data(w.floats(ceil_div(C_, k_.panel()) * r_ * k_.panel())) {}
  int64_t tasks() const { return ceil_div(C, kChunk * k.panel()); }
  void pack(const Matrix& right, int64_t task) const;
  // Floats of the left operand of a tile of up to `rows` rows, [vector of rows][r][lanes], and where its row i begins.
  int64_t left_size(int rows) const { return ceil_div(rows, k.lanes) * r * k.lanes; }
  int64_t left_at(int64_t i) const { return i / k.lanes * r * k.lanes + i % k.lanes; }
  // The same as steps of the product's own tile.
  Tail steps(const float* left, int64_t panel) const { return {left, data + panel * r * k.panel(), r}; }
  // c (+)= left · columns of a panel
  void multiply(const float* left, int rows, int64_t panel, float* c, bool accumulate = false) const {
    const float* right = data + panel * r * k.panel();
    each_f32_tile(k, rows, [&](int64_t i, int rows_here) {
      k.f32.tile(rows_here, 2, left + left_at(i), right, r * k.lanes, r, c + i * k.panel(), accumulate, kNothingAhead);
    });
  }

  static constexpr int64_t kChunk = 8;
};

// What multiplies a product's columns before the bias.
struct OutScale {
  const float* by = nullptr;  // with room for whole panels; null: nothing
  Matrix unscaled = {};       // where the product is kept as it is, or absent
  bool tail_last = false;     // then what is kept is without the tail

  // `scale` (C), or null
  static const float* padded(const Kernels& k, const float* scale, int64_t C, Workspace& w);
  void keep(const Kernels& k, const float* c, int rows, int cols, int64_t row, int64_t col) const {
    if (unscaled.data) k.store_tile(c, rows, cols, Matrix{}, from(unscaled, row, col));
  }
  void apply(const Kernels& k, float* c, int rows, int64_t col) const {
    if (by) k.scale_tile(c, rows, by + col);
  }
};

class MixedRows;

// One block of rows of the product. `run(task, next, thread)` computes a group of columns for a range of the block's tiles.
struct Product {
  const Kernels& k;
  const Arithmetic& arithmetic;
  Parts tiles;  // of the block's rows
  int64_t R, C;
  const float* left = nullptr;     // packed tiles; null: `out` already holds left · right
  Matrix right = {};               // (R, C)
  QuantizedWeight quantized = {};  // right in 4 bits, instead: the weight, or its transpose
  bool transpose = false;
  const float* panels = nullptr;     // right packed beforehand, or null
  const float* tail_left = nullptr;  // [tile][tail->left_size]
  const UpPanels* tail = nullptr;
  const MixedRows* mixed = nullptr;  // instead, where rows differ in their tail
  Mask tail_mask = {};               // applied to the tail alone
  OutScale scale = {};               // as `out`
  Matrix bias = {};
  Matrix out = {};  // from the block's first row

  // How `plan` splits it into tasks; `scratch` holds threads * scratch_size floats.
  int64_t group = 1, groups = 0, row_parts = 1, k_block = 0, packed_size = 0, scratch_size = 0;
  float* scratch = nullptr;

  void plan(int threads);
  int64_t tasks() const { return groups * row_parts; }
  void run(int64_t task, int64_t next, int thread) const;

 private:
  int64_t result_size() const { return arithmetic.rows * k.panel(); }
  int64_t first_panel(int64_t task) const { return task / row_parts * group; }
  int64_t last_panel(int64_t task) const { return std::min(first_panel(task) + group, ceil_div(C, k.panel())); }
  const float* kept(int64_t panel, int64_t k0) const;
  void fetch_out(int64_t tile, int64_t panel) const;
  void fetch_right(int64_t task, int64_t k0, int64_t call, int64_t calls, int64_t steps, Ahead& ahead) const;
  void finish(int64_t tile, int64_t panel, float* c) const;
  void start(int64_t tile, int64_t p0, int64_t p1, float* c, int64_t stride) const;
};

}  // namespace lora_ops
