// yᵀ = W0 xᵀ for few rows of x and a 4-bit weight, where a left operand is not transposed (AMX): a strip of the weight's rows
// is decoded straight into one, block by block, and multiplied by all of x, which is packed once as the right operand.
#pragma once

#include "gemm.h"

namespace lora_ops {

constexpr int64_t kStripBytes = 1 << 20;  // of packed x: it stays in L2 for all strips

struct Strips {
  const Kernels& k;
  const LoraForward& p;
  Steps steps;
  float* x_panels;  // [ceil(M / panel)][2][step][lanes]
  float* scratch;   // threads * scratch_size

  static bool fit(const LoraForward& p, const Kernels& k) {
    return p.quantized.codes && p.x.dtype == DType::bf16 && k.bf16.left_in_rows &&
           p.M * p.K * size_of(p.x.dtype) <= kStripBytes;
  }

  Strips(const Kernels& k_, const LoraForward& p_, int threads, Workspace& w)
      : k(k_),
        p(p_),
        steps(k_, k_.bf16, p_.K),
        x_panels(w.floats(panels() * 2 * steps.vector)),
        scratch(w.floats(scratch_size() * threads)) {}

  int64_t panels() const { return ceil_div(p.M, k.panel()); }
  int64_t height() const { return k.bf16.rows; }  // rows of a strip
  int64_t product_size() const { return height() * k.panel(); }
  int64_t scratch_size() const { return panels() * product_size() + height() * kMostDecoded / 2 + 16; }

  int64_t tasks() const { return ceil_div(p.M, k.lanes); }
  void pack_x(int64_t task) const {
    const int64_t row = task * k.lanes;
    const int rows = static_cast<int>(std::min<int64_t>(k.lanes, p.M - row));
    k.bf16.pack_transposed(from(p.x, row, 0), rows, p.K, Mask{}, x_panels + task * steps.vector);
  }

  // The products of rows [row, row + rows) of the weight with all of x, [panel of M][row][panel].
  const float* run(int64_t row, int rows, int thread) const {
    float* products = scratch + thread * scratch_size();
    char* decoded = reinterpret_cast<char*>(products + panels() * product_size());
    constexpr int64_t kRowBytes = 32 * size_of(DType::bf16);
    k.bf16.begin();
    for (int64_t k0 = 0; k0 < p.K; k0 += kMostDecoded) {
      const int64_t count = std::min<int64_t>(kMostDecoded, p.K - k0), first = k0 / k.bf16.k_per_step;
      for (int i = 0; i < rows; ++i)
        k.decode(p.quantized, row + i, k0, count, DType::bf16, decoded + i * kRowBytes, height() * kRowBytes);
      for (int64_t m = 0; m < panels(); ++m)
        k.bf16.tile(rows, p.M - m * k.panel() > k.lanes ? 2 : 1, reinterpret_cast<const float*>(decoded),
                    x_panels + m * 2 * steps.vector + first * k.lanes, steps.vector, Steps(k, k.bf16, count).count,
                    products + m * product_size(), k0 > 0, {});
    }
    k.bf16.end();
    return products;
  }

  // c[i][j] += the product of x's row m + i and the strip's row j
  void add(const float* products, int64_t m, int rows, int cols, float* c) const {
    for (int i = 0; i < rows; ++i, ++m) {
      const float* column = products + m / k.panel() * product_size() + m % k.panel();
      for (int j = 0; j < cols; ++j) c[i * k.panel() + j] += column[j * k.panel()];
    }
  }
};

}  // namespace lora_ops
