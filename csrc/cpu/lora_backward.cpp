// dS = scaling · dy B ;  dx = dy W0 + drop'(dS A) ;  dA = dSᵀ drop(x) ;  dB = scaling · dyᵀ S ;  dbias = Σ_rows dy
//
// For each block of rows: every row tile of dy is packed once and multiplied by B while it is hot (dS). Then three kinds of
// tasks share the threads: groups of columns of dx (gemm.h, dS A being the tail), and groups of columns of x and of dy,
// reduced over the block's rows into dA and dBᵀ (dbias is one more row of dBᵀ: Sᵀ with a row of ones). Each element of
// every result is summed by one thread in one order: results do not depend on the number of threads.
#include "dispatch.h"
#include "gemm.h"
#include "mixed.h"

#include <optional>

namespace lora_ops {
namespace {

constexpr int64_t kColumns = 8;     // panels of a task that reduces over rows: neighbours in memory, read together
constexpr int64_t kRowBlock = 256;  // rows of a panel packed at a time

// sums (rows, C) = leftᵀ · right over all rows of M, block by block: left (M, rows) skinny, right (M, C) wide.
struct RowReduction {
  const Kernels& k;
  Parts tiles;  // of the result's rows
  int64_t C;
  float* sums;  // [panel][row][k.panel()]

  RowReduction(const Kernels& k_, int64_t rows, int64_t C_, Workspace& w)
      : k(k_), tiles(rows, k_.f32.rows), C(C_), sums(w.floats(size())) {}

  int64_t size() const { return ceil_div(C, k.panel()) * tiles.total * k.panel(); }
  int64_t panels() const { return tiles.total ? ceil_div(C, k.panel()) : 0; }
  int64_t tasks() const { return ceil_div(panels(), kColumns); }
  float* sum(int64_t panel, int64_t row) const { return sums + (panel * tiles.total + row) * k.panel(); }
  int64_t left_size(int64_t M) const { return tiles.count * M * k.lanes; }
  // Where row i of the result and row m of the block meet in the packed left operand, [tile][M][lanes].
  int64_t left_at(int64_t tile, int64_t m, int64_t M) const { return (tile * M + m) * k.lanes; }

  // One block of M rows. `mask` belongs to right's rows.
  void run(int64_t task, const float* left, int64_t M, const Matrix& right, Mask mask, bool first_block, float* packed) const {
    const int64_t p0 = task * kColumns, p1 = std::min(p0 + kColumns, panels());
    for (int64_t m = 0; m < M; m += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, M - m);
      const Mask part{mask.words ? mask.words + m * mask.row_stride : nullptr, mask.row_stride, p0 * k.panel()};
      const int64_t vector_stride = padded_vector(rows * k.lanes);
      pack_right(k, k.f32, right, C, p0 * k.panel(), static_cast<int>(2 * (p1 - p0)), m, rows, part, packed, vector_stride);
      for (int64_t p = p0; p < p1; ++p)
        for (int64_t t = 0; t < tiles.count; ++t) {
          k.f32.tile(static_cast<int>(tiles.size(t)), 2, left + left_at(t, m, M), packed + (p - p0) * 2 * vector_stride,
                     vector_stride, rows, sum(p, tiles.start(t)), !first_block || m > 0, {});
        }
    }
  }

  int cols(int64_t panel) const { return static_cast<int>(std::min<int64_t>(C - panel * k.panel(), k.panel())); }

  // out (rows, C), from the result's row `first` on
  void store(int64_t panel, int64_t first, int64_t rows, const Matrix& out) const {
    k.store_tile(sum(panel, first), static_cast<int>(rows), cols(panel), Matrix{}, from(out, 0, panel * k.panel()));
  }

  // out (C, rows), times `scale`
  void store_transposed(int64_t panel, int64_t rows, float scale, const Matrix& out) const {
    lora_ops::store_transposed(k, sum(panel, 0), rows, cols(panel), scale, from(out, panel * k.panel(), 0));
  }
};

void backward_blocks(const LoraBackward& p, const Kernels& k) {
  const bool product_here = p.dx.data && (p.weight.data || p.quantized.codes);
  const Arithmetic& arithmetic =
      product_here ? arithmetic_of(k, p.dy.dtype, p.quantized.codes ? p.dy.dtype : p.weight.dtype) : k.f32;
  const Steps steps(k, arithmetic, p.N);
  const Parts blocks(p.M, block_rows(arithmetic, steps));
  const int threads = useful_threads(p.threads, p.M * p.N * (product_here ? p.K : p.r));
  const bool mixed = p.mixed.ids;
  const bool any_dA = mixed ? std::any_of(p.mixed.adapters, p.mixed.adapters + p.mixed.count, [](auto& a) { return a.dA.data; })
                            : p.dA.data != nullptr;
  const bool need_dS = p.dx.data || any_dA;
  const bool own_tile = need_dS && arithmetic.k_per_step > 1;  // dS needs fp32 elements
  const int64_t words = p.dropout.threshold && need_dS ? mask_words(p.K) : 0;
  const int64_t most_rows = blocks.size(0);

  Workspace workspace;
  const int64_t r = mixed ? 0 : p.r;
  const DownPanels b(k, p.N, r, workspace);
  const UpPanels a(k, r, p.K, workspace);
  const RowReduction down_grad(k, p.dA.data ? p.r : 0, p.K, workspace);
  const RowReduction up_grad(k, (p.dB.data ? p.r : 0) + (p.dbias.data ? 1 : 0), p.N, workspace);
  const int64_t most_tiles = Parts(most_rows, arithmetic.rows).count;
  float* left = workspace.floats(most_tiles * steps.left);
  float* tail_left = workspace.floats(mixed ? most_rows * p.r * k.lanes : most_tiles * a.left_size(arithmetic.rows));
  float* mixed_dS = workspace.floats(mixed ? p.M * p.r : 0);
  float* dS_left = workspace.floats(down_grad.left_size(most_rows));
  float* S_left = workspace.floats(up_grad.left_size(most_rows));
  uint32_t* all_bits = workspace.words((mixed ? p.M : most_rows) * words);
  const int64_t own_down = mixed ? MixedRows::backward_size(k, p) : own_tile ? p.N * k.lanes : 0;
  const int64_t own_size = std::max(own_down, 2 * kColumns * padded_vector(kRowBlock * k.lanes));
  float* own = workspace.floats(own_size * threads);
  float* scratch = nullptr;  // of the first block: no later one is larger

  if (p.M == 0) {  // sums over no rows
    std::fill_n(down_grad.sums, down_grad.size(), 0.f);
    std::fill_n(up_grad.sums, up_grad.size(), 0.f);
  }

  Tasks adapters(need_dS && !mixed ? b.tasks() + a.tasks() : 0);
  for (int64_t m = 0; m < blocks.count; ++m) {
    const int64_t row0 = blocks.start(m), rows_here = blocks.size(m);
    uint32_t* bits = all_bits + (mixed ? row0 * words : 0);
    Product product{k, arithmetic, Parts(rows_here, arithmetic.rows), p.N, p.K};
    product.left = product_here ? left : nullptr;
    product.right = p.weight;
    product.quantized = p.quantized;
    product.tail_left = tail_left;
    product.tail = &a;
    product.tail_mask = words ? Mask{bits, words} : Mask{};
    product.out = p.dx.data ? from(p.dx, row0, 0) : Matrix{};
    if (p.dx.data) {
      product.plan(threads);
      product.scratch = scratch = m == 0 ? workspace.floats(product.scratch_size * threads) : scratch;
    }

    std::optional<const MixedRows> rows_of;
    if (mixed) product.mixed = &rows_of.emplace(k, p.mixed, Side::up_A, p.r, p.K, row0, product.tiles);

    // dS of an fp32 tile, which begins at row `first` of the block: the tail's left operand and dA's.
    const auto dS = [&](const float* tile, int64_t first, int rows, float* tail) {
      const float scale = p.scaling * p.dropout.keep_scale;
      alignas(64) float c[kMaxTile];
      for (int64_t j0 = 0; j0 < p.r; j0 += k.panel()) {
        b.multiply(tile, rows, j0, c);
        for (int64_t j = j0; j < std::min(p.r, j0 + k.panel()); ++j)
          for (int i = 0; i < rows; ++i) tail[j * k.lanes + i] = scale * c[i * k.panel() + j - j0];
      }
      if (!p.dA.data) return;
      for (int64_t l = 0; l < down_grad.tiles.count; ++l)
        for (int i = 0; i < rows; ++i)
          for (int64_t j = 0; j < down_grad.tiles.size(l); ++j) {
            dS_left[down_grad.left_at(l, first + i, rows_here) + j] = tail[(down_grad.tiles.start(l) + j) * k.lanes + i];
          }
    };
    const auto S = [&](int64_t t) {
      for (int64_t l = 0; l < up_grad.tiles.count; ++l)
        for (int64_t i = product.tiles.start(t); i < product.tiles.start(t) + product.tiles.size(t); ++i)
          for (int64_t j = 0; j < up_grad.tiles.size(l); ++j) {
            const int64_t col = up_grad.tiles.start(l) + j;
            const bool ones = p.dbias.data && col == up_grad.tiles.total - 1;
            S_left[up_grad.left_at(l, i, rows_here) + j] = ones ? 1.f : p.S[(row0 + i) * p.r + col];
          }
    };
    const auto pack_and_down = [&](int64_t t, int thread) {
      const int rows = static_cast<int>(product.tiles.size(t));
      const int64_t first = product.tiles.start(t);
      S(t);
      if (words) {
        for (int64_t i = first; i < first + rows; ++i) k.dropout_mask(p.dropout, row0 + i, p.K, bits + i * words);
      }
      if (!need_dS) return;
      float* tile = left + t * steps.left;
      if (product.left || !mixed) pack_left(k, arithmetic, p.dy, p.M, row0 + first, p.N, Mask{}, tile);
      if (mixed) return rows_of->down(t, p, own + thread * own_size, tail_left, mixed_dS);
      each_f32_tile(k, rows, [&](int64_t i, int rows_there) {
        if (own_tile) {
          tile = own + thread * own_size;
          pack_left(k, k.f32, p.dy, p.M, row0 + first + i, p.N, Mask{}, tile);
        }
        dS(tile, first + i, rows_there, tail_left + t * a.left_size(arithmetic.rows) + a.left_at(i));
      });
    };

    const int64_t products = p.dx.data ? product.tasks() : 0;
    Tasks tiles(product.tiles.count), rest(products + down_grad.tasks() + up_grad.tasks());
    parallel(threads, [&](int thread) {
      float* packed = own + thread * own_size;
      adapters.run([&](int64_t t) { t < b.tasks() ? b.pack(p.lora_B, t) : a.pack(p.lora_A, t - b.tasks()); });
      sync();
      tiles.run([&](int64_t t) { pack_and_down(t, thread); });
      sync();
      rest.run([&](int64_t t, int64_t next) {
        if (t < products) return product.run(t, next, thread);
        t -= products;
        if (t < down_grad.tasks())
          return down_grad.run(t, dS_left, rows_here, from(p.x, row0, 0), product.tail_mask, m == 0, packed);
        up_grad.run(t - down_grad.tasks(), S_left, rows_here, from(p.dy, row0, 0), Mask{}, m == 0, packed);
      });
    });
  }

  if (mixed) mixed_gradients(k, p, mixed_dS, all_bits, words, threads, workspace);
  Tasks stores(down_grad.panels() + up_grad.panels());
  parallel(threads, [&](int) {
    stores.run([&](int64_t t) {
      if (t < down_grad.panels()) return down_grad.store(t, 0, p.r, p.dA);
      t -= down_grad.panels();
      if (p.dB.data) up_grad.store_transposed(t, p.r, p.scaling, p.dB);
      if (p.dbias.data) up_grad.store(t, up_grad.tiles.total - 1, 1, p.dbias);
    });
  });
}

}  // namespace

void lora_backward(const LoraBackward& p) {
  backward_blocks(p, kernels());
}

}  // namespace lora_ops
