// A factor of rank r packed for both of its uses as a right operand: reduced over its long side ("down", to r columns) or
// over r ("up", the tail of a product).
//
// Its products are fp32's. Where bf16 products are many times faster (AMX: Arithmetic::split) an fp32 number is taken as a sum
// of bf16 ones, each the rounding of what the ones before leave: three hold all its 24 bits, two hold 16. The other operand of
// "down" is bf16 already, so three parts of the factor give the product exactly. "Up" multiplies two such sums, for a result
// that is rounded to bf16: high · high + low · high + high · low is good to 16 bits. Parts are stacked along r.
#pragma once

#include "gemm.h"

namespace lora_ops {

constexpr int64_t kParts = 3;

// The arithmetic of the low-rank factors beside a product's.
inline const Arithmetic& low_rank_arithmetic(const Kernels& k, const Arithmetic& product) {
  return product.split ? product : k.f32;
}

// The low-rank arithmetic's tiles may have fewer rows than the product's: body(row, rows) for each of them. None reaches over a
// vector's end.
template <class F>
void each_low_tile(const Kernels& k, const Arithmetic& low, int64_t rows, const F& body) {
  if (rows <= low.rows) return body(0, static_cast<int>(rows));
  for (int64_t v = 0; v < rows; v += k.lanes) {
    const Parts parts(std::min<int64_t>(k.lanes, rows - v), low.rows);
    for (int64_t i = 0; i < parts.count; ++i) body(v + parts.start(i), static_cast<int>(parts.size(i)));
  }
}

struct DownPanels {  // right (R, r)
  const Kernels& k;
  const Arithmetic& low;
  int64_t R, r, cols;  // cols: r, or its parts
  Steps steps;
  float* data;
  uint16_t* parts;
  DownPanels(const Kernels& k_, const Arithmetic& low_, int64_t R_, int64_t r_, Workspace& w);
  int64_t tasks() const { return ceil_div(R, kChunk); }
  void pack(const Matrix& right, int64_t task) const;
  // s (rows, r) = left · right, from a packed tile
  void multiply(const float* left, int rows, float* s) const;

  static constexpr int64_t kChunk = 512;
};

struct UpPanels {  // right (r, C)
  const Kernels& k;
  const Arithmetic& low;
  int64_t r, C, depth;  // depth: r, or its parts
  Steps steps;
  float* data;
  uint16_t* parts;
  UpPanels(const Kernels& k_, const Arithmetic& low_, int64_t r_, int64_t C_, Workspace& w);
  int64_t tasks() const { return ceil_div(C, kChunk * k.panel()); }
  void pack(const Matrix& right, int64_t task) const;
  // Floats of the left operand of a tile of up to `rows` rows; its row i, s (r).
  int64_t left_size(int rows) const;
  void set_left(float* left, int64_t i, const float* s) const;
  // c = left · columns of a panel
  void multiply(const float* left, int rows, int64_t panel, float* c) const;

  static constexpr int64_t kChunk = 8;
};

}  // namespace lora_ops
