// yᵀ = W0 xᵀ for few rows of x and a bf16 or 4-bit weight, strip by strip of the weight's rows, where this ISA has a kernel for
// it (amx_strip.h): x is packed once, and stays in L2.
#pragma once

#include "gemm.h"

namespace lora_ops {

constexpr int64_t kStripBytes = 1 << 20;  // of packed x; half as much for a dense weight, whose packing pays sooner
constexpr int64_t kFewestInStrips = 3;    // rows of x: fewer are faster as dot products (measured)

struct Strips {
  const Kernels& k;
  const LoraForward& p;
  Steps steps;
  float* x_panels;  // [panel of M][2][step][lanes]
  float* scratch;   // threads * scratch_size: products, and what the kernel needs

  static bool fit(const LoraForward& p, const Kernels& k) {
    if (p.x.dtype != DType::bf16 || !k.strip || p.K % 32 != 0 || p.M < kFewestInStrips) return false;
    const int64_t bytes = p.M * p.K * size_of(p.x.dtype);
    if (p.quantized.codes) return bytes <= kStripBytes;
    const bool rows = p.weight.data && p.weight.col_stride == 1 && p.weight.dtype == DType::bf16;
    return rows && (p.panels ? p.M <= k.panel() : bytes <= kStripBytes / 2);
  }

  Strips(const Kernels& k_, const LoraForward& p_, int threads, Workspace& w)
      : k(k_),
        p(p_),
        steps(k_, k_.bf16, p_.K),
        x_panels(w.floats(panels() * 2 * steps.vector)),
        scratch(w.floats(scratch_size() * threads)) {}

  int64_t panels() const { return ceil_div(p.M, k.panel()); }
  int64_t products_size() const { return panels() * k.panel() * k.panel(); }
  int64_t scratch_size() const { return products_size() + k.strip_scratch(p.K) / 4; }

  int64_t tasks() const { return ceil_div(p.M, k.lanes); }
  void pack_x(int64_t task) const {
    const int64_t row = task * k.lanes;
    const int rows = static_cast<int>(std::min<int64_t>(k.lanes, p.M - row));
    k.bf16.pack_transposed(from(p.x, row, 0), rows, p.K, x_panels + task * steps.vector);
  }

  // The products of all of x with rows [row, row + rows) of the weight.
  const float* run(int64_t row, int rows, int thread) const {
    float* products = scratch + thread * scratch_size();
    k.strip(p.weight, p.quantized, p.K, row, rows, x_panels, steps.vector, p.M, products,
            reinterpret_cast<char*>(products + products_size()));
    return products;
  }

  // c[i][j] += the product of x's row m + i and the strip's row j
  void add(const float* products, int64_t m, int rows, int cols, float* c) const {
    for (int i = 0; i < rows; ++i, ++m) {
      const float* column = products + m / k.panel() * k.panel() * k.panel() + m % k.panel();
      for (int j = 0; j < cols; ++j) c[i * k.panel() + j] += column[j * k.panel()];
    }
  }
};

}  // namespace lora_ops
