// What stands between A and B, (S ∘ gate) core, on the left operand of a tail, [r][lanes] of a tile's rows, in place.
#pragma once

#include "gemm.h"

namespace lora_ops {

struct MiddleOf {
  const Middle& m;
  const int64_t r;
  UpPanels core, transposed_core;
  float* own;  // of each thread: own_size

  // `backward`: coreᵀ is needed too
  MiddleOf(const Kernels& k, const Middle& m_, int64_t r_, bool backward, int threads, Workspace& w)
      : m(m_),
        r(r_),
        core(k, m_.core.data ? r_ : 0, r_, w),
        transposed_core(k, m_.core.data && backward ? r_ : 0, r_, w),
        own(w.floats(m_.core.data ? own_size() * threads : 0)) {
    if (core.r) pack_whole(core, m.core);
    if (transposed_core.r) pack_whole(transposed_core, transposed(m.core));
  }

  bool present() const { return m.gate || m.core.data; }

  // Rows `row` and on of M.
  void gate(int64_t row, int rows, float* tail) const {
    if (!m.gate) return;
    for (int i = 0; i < rows; ++i)
      for (int64_t j = 0; j < r; ++j) tail[j * core.k.lanes + i] *= m.gate[(row + i) * m.gate_row_stride + j];
  }

  // By core or transposed_core, if there is one.
  void multiply(const UpPanels& by, int rows, float* tail, int thread) const {
    if (!by.r) return;
    const int64_t panel = by.k.panel();
    float* sums = own + thread * own_size();
    for (int64_t p = 0; p * panel < r; ++p) by.multiply(tail, rows, p, sums + p * rows * panel);
    for (int64_t j = 0; j < r; ++j)
      for (int i = 0; i < rows; ++i) tail[j * by.k.lanes + i] = sums[(j / panel * rows + i) * panel + j % panel];
  }

  void forward(int64_t row, int rows, float* tail, int thread) const {
    gate(row, rows, tail);
    multiply(core, rows, tail, thread);
  }

 private:
  int64_t own_size() const { return ceil_div(r, core.k.panel()) * core.k.panel() * core.k.lanes; }
  static void pack_whole(const UpPanels& panels, const Matrix& right) {
    for (int64_t t = 0; t < panels.tasks(); ++t) panels.pack(right, t);
  }
};

}  // namespace lora_ops
