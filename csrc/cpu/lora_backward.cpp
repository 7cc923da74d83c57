// dS = scaling · dy B ;  dx = dy W0 + drop'(dS A) ;  dA = dSᵀ drop(x) ;  dB = scaling · dyᵀ S ;  dbias = Σ_rows dy
// and the general form of params.h
//
// For each block of rows: every row tile of dy is packed once and multiplied by B while it is hot (dS). Then three kinds of
// tasks share the threads: groups of columns of dx (gemm.h, dS A being the tail), and groups of columns of x and of dy,
// reduced over the block's rows into dA and dBᵀ (dbias is one more row of dBᵀ: Sᵀ with a row of ones). Each element of
// every result is summed by one thread in one order: results do not depend on the number of threads.
//
// out_scale acts on the tile of dy that is packed, on B where dS has a tile of its own, and on dB as it is stored: only the
// product's operand is ever rounded to dy's type. Gate and core act on tiles of S and dS.
#include "dispatch.h"
#include "gemm.h"
#include "middle.h"
#include "mixed.h"

#include <optional>
#include <vector>

namespace lora_ops {
namespace {

constexpr int64_t kColumns = 8;     // panels of a task that reduces over rows: neighbours in memory, read together
constexpr int64_t kRowBlock = 256;  // rows of a panel at a time
constexpr int64_t kDotChain = 32;   // rows of dy ∘ z summed before they meet the rest

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

  // A tile of the block's rows `first` and on, [column][lanes], as columns [0, count) of the packed left operand.
  void put(const float* tile, int64_t first, int rows, int64_t count, int64_t M, float* left) const {
    for (int64_t t = 0; t < tiles.count; ++t)
      for (int i = 0; i < rows; ++i)
        for (int64_t j = tiles.start(t); j < std::min(tiles.start(t) + tiles.size(t), count); ++j)
          left[left_at(t, first + i, M) + j - tiles.start(t)] = tile[j * k.lanes + i];
  }

  // One block of M rows. `mask` belongs to right's rows.
  void run(int64_t task, const float* left, int64_t M, const Matrix& right, Mask mask, bool first_block, float* packed) const {
    const int64_t p0 = task * kColumns, p1 = std::min(p0 + kColumns, panels());
    for (int64_t m = 0; m < M; m += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, M - m);
      if (right.col_stride == 1 && !mask.words && p1 * k.panel() <= C) {
        for (int64_t p = p0; p < p1; ++p)
          for (int64_t t = 0; t < tiles.count; ++t)
            k.tile_in_place(static_cast<int>(tiles.size(t)), left + left_at(t, m, M), from(right, m, p * k.panel()), rows,
                            sum(p, tiles.start(t)), !first_block || m > 0);
        continue;
      }
      const Mask part{mask.words ? mask.words + m * mask.row_stride : nullptr, mask.row_stride, p0 * k.panel()};
      const int64_t vector_stride = padded_vector(rows * k.lanes);
      pack_right(k, k.f32, right, C, p0 * k.panel(), static_cast<int>(2 * (p1 - p0)), m, rows, part, packed, vector_stride);
      for (int64_t p = p0; p < p1; ++p)
        for (int64_t t = 0; t < tiles.count; ++t) {
          k.f32.tile(static_cast<int>(tiles.size(t)), 2, left + left_at(t, m, M), packed + (p - p0) * 2 * vector_stride,
                     vector_stride, rows, sum(p, tiles.start(t)), !first_block || m > 0, kNothingAhead);
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

// sums[j] (+)= Σ_i a[i][j] · b[i][j]
void column_dots(const Kernels& k, const Matrix& a, const Matrix& b, int64_t rows, int64_t cols, bool accumulate, float* sums) {
  if (!accumulate) std::fill_n(sums, cols, 0.f);
  for (int64_t i = 0; i < rows; i += kDotChain) {
    alignas(64) float part[kColumns * 2 * kMaxLanes] = {};
    k.column_dots(from(a, i, 0), from(b, i, 0), std::min(kDotChain, rows - i), cols, part);
    for (int64_t j = 0; j < cols; ++j) sums[j] += part[j];
  }
}

// sums[j] += scaling · Σ_i dS[i][j] · B[j][i] over a panel of dyᵀ S, transposed, and of B's rows.
void tail_dots(const Kernels& k, const float* dS, const Matrix& B, int rows, int64_t r, float scaling, float* sums) {
  for (int64_t i0 = 0; i0 < r; i0 += k.panel()) {
    const int cols = static_cast<int>(std::min<int64_t>(r - i0, k.panel()));
    alignas(64) float b[kMaxTile] = {};
    k.load_tile(from(B, 0, i0), rows, cols, b);
    for (int j = 0; j < rows; ++j)
      for (int i = 0; i < cols; ++i) sums[j] += scaling * dS[(i0 + i) * k.panel() + j] * b[j * k.panel() + i];
  }
}

void sum_rows(const float* rows, int64_t M, int64_t r, float* sums) {
  std::vector<double> wide(r);
  for (int64_t i = 0; i < M; ++i)
    for (int64_t j = 0; j < r; ++j) wide[j] += rows[i * r + j];
  std::copy(wide.begin(), wide.end(), sums);
}

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
  const bool through_A = p.dx.data || any_dA, need_dS = through_A || p.dgate || p.dcore;
  const bool own_tile = need_dS && arithmetic.k_per_step > 1;  // dS needs fp32 elements
  const int64_t words = p.dropout.threshold && through_A ? mask_words(p.K) : 0;
  const int64_t most_rows = blocks.size(0);

  Workspace workspace;
  const int64_t r = mixed ? 0 : p.r;
  const DownPanels b(k, p.N, r, workspace);
  const UpPanels a(k, r, p.K, workspace);
  const RowReduction down_grad(k, p.dA.data ? p.r : 0, p.K, workspace);
  const bool scaled_tail = p.dout_scale && p.z.dtype != DType::f32;  // z is without its tail
  const int64_t up_rows = p.dB.data || scaled_tail ? p.r : 0;
  const RowReduction up_grad(k, up_rows + (p.dbias.data ? 1 : 0), p.N, workspace);
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
  const MiddleOf middle(k, p.middle, r, true, threads, workspace);
  const RowReduction core_grad(k, p.dcore ? r : 0, r, workspace);
  float* S1_left = workspace.floats(core_grad.left_size(most_rows));
  float* dS2 = workspace.floats(p.dcore ? most_rows * r : 0);
  float* own_S = workspace.floats(middle.present() ? threads * r * k.lanes : 0);
  float* dgate = p.middle.gate_row_stride ? p.dgate : workspace.floats(p.dgate ? p.M * r : 0);
  const float* out_scale = OutScale::padded(k, p.out_scale, p.N, workspace);
  const int64_t dz_rows = Steps::left_vectors(k, arithmetic) * k.lanes, dz_stride = p.N + 32;  // as kDecodeStride
  const bool widened = product_here && own_tile && arithmetic.widen_left;  // the packed tile gives dS's, and is scaled then
  float* own_dz = workspace.floats(out_scale && !widened ? threads * dz_rows * dz_stride : 0);
  float* scratch = nullptr;  // of the first block: no later one is larger

  if (p.M == 0) {  // sums over no rows
    std::fill_n(down_grad.sums, down_grad.size(), 0.f);
    std::fill_n(up_grad.sums, up_grad.size(), 0.f);
    std::fill_n(core_grad.sums, core_grad.size(), 0.f);
    if (p.dout_scale) std::fill_n(p.dout_scale, p.N, 0.f);
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
    std::optional<const MixedRows> rows_of;
    if (mixed) product.mixed = &rows_of.emplace(k, p.mixed, Side::up_A, p.r, p.K, row0, product.tiles);
    if (p.dx.data) {
      product.plan(threads);
      product.scratch = scratch = m == 0 ? workspace.floats(product.scratch_size * threads) : scratch;
    }

    // dS2 of a tile becomes dS.
    const auto through_middle = [&](int64_t first, int rows, float* tail, int thread) {
      const auto each = [&](const auto& f) {
        for (int i = 0; i < rows; ++i)
          for (int64_t j = 0; j < r; ++j) f(i, j, tail[j * k.lanes + i]);
      };
      if (p.dcore) each([&](int i, int64_t j, float v) { dS2[(first + i) * r + j] = v; });
      middle.multiply(middle.transposed_core, rows, tail, thread);
      const int64_t row = row0 + first;
      if (p.dgate) each([&](int i, int64_t j, float v) { dgate[(row + i) * r + j] = v * p.S[(row + i) * r + j]; });
      middle.gate(row, rows, tail);
      if (p.dropout.keep_scale != 1.f) each([&](int, int64_t, float& v) { v *= p.dropout.keep_scale; });
    };
    // dS of an fp32 tile, which begins at row `first` of the block: the tail's left operand and dA's.
    const auto dS = [&](const float* tile, int64_t first, int rows, float* tail, int thread) {
      const float scale = p.scaling * (middle.present() ? 1.f : p.dropout.keep_scale);
      alignas(64) float c[kMaxTile];
      for (int64_t j0 = 0; j0 < p.r; j0 += k.panel()) {
        b.multiply(tile, rows, j0, c);
        for (int64_t j = j0; j < std::min(p.r, j0 + k.panel()); ++j)
          for (int i = 0; i < rows; ++i) tail[j * k.lanes + i] = scale * c[i * k.panel() + j - j0];
      }
      if (middle.present()) through_middle(first, rows, tail, thread);
      if (p.dA.data) down_grad.put(tail, first, rows, p.r, rows_here, dS_left);
    };
    // S1 and S2 of a tile of the product.
    const auto through_S = [&](int64_t t, int thread) {
      float* tile = own_S + thread * r * k.lanes;
      each_f32_tile(k, product.tiles.size(t), [&](int64_t i0, int rows) {
        const int64_t first = product.tiles.start(t) + i0, row = row0 + first;
        for (int i = 0; i < rows; ++i)
          for (int64_t j = 0; j < r; ++j) tile[j * k.lanes + i] = p.S[(row + i) * r + j];
        middle.gate(row, rows, tile);
        if (p.dcore) core_grad.put(tile, first, rows, r, rows_here, S1_left);
        if (!up_rows) return;
        middle.multiply(middle.core, rows, tile, thread);
        up_grad.put(tile, first, rows, r, rows_here, S_left);
      });
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
    const auto scaled = [&](const Matrix& dy, int64_t rows, int thread) {
      const Matrix dz{own_dz + thread * dz_rows * dz_stride, dz_stride, 1, own_tile ? p.dy.dtype : DType::f32};
      for (int64_t i = 0; i < rows; ++i) k.scale_row(from(dy, i, 0), p.N, out_scale, from(dz, i, 0));
      return dz;
    };
    const auto pack_and_down = [&](int64_t t, int thread) {
      const int rows = static_cast<int>(product.tiles.size(t));
      const int64_t first = product.tiles.start(t);
      S(t);
      if (middle.present() && (up_rows || p.dcore)) through_S(t, thread);
      if (words) {
        for (int64_t i = first; i < first + rows; ++i) k.dropout_mask(p.dropout, row0 + i, p.K, bits + i * words);
      }
      if (!need_dS) return;
      float* tile = left + t * steps.left;
      const Matrix dy = from(p.dy, row0 + first, 0);
      const int64_t follow = p.M - row0 - first, together = std::min(follow, dz_rows);
      if (product.left || !mixed) {
        pack_left(k, arithmetic, out_scale && !widened ? scaled(dy, together, thread) : dy, together, 0, p.N, tile);
      }
      if (mixed) return rows_of->down(t, p, own + thread * own_size, tail_left, mixed_dS);
      each_f32_tile(k, rows, [&](int64_t i, int rows_there) {
        if (own_tile) {
          tile = own + thread * own_size;
          if (widened) {
            arithmetic.widen_left(left + t * steps.left, p.N, out_scale, tile);
          } else {
            pack_left(k, k.f32, dy, follow, i, p.N, tile);
          }
        }
        dS(tile, first + i, rows_there, tail_left + t * a.left_size(arithmetic.rows) + a.left_at(i), thread);
      });
    };

    const int64_t products = p.dx.data ? product.tasks() : 0;
    const int64_t scale_tasks = p.dout_scale ? ceil_div(p.N, kColumns * k.panel()) : 0;
    Tasks tiles(product.tiles.count), rest(products + down_grad.tasks() + up_grad.tasks() + core_grad.tasks() + scale_tasks);
    parallel(threads, [&](int thread) {
      float* packed = own + thread * own_size;
      adapters.run([&](int64_t t) {
        if (t >= b.tasks()) return a.pack(p.lora_A, t - b.tasks());
        b.pack(p.lora_B, t);
        if (out_scale && own_tile) b.scale(out_scale, t);
      });
      sync();
      tiles.run([&](int64_t t) { pack_and_down(t, thread); });
      sync();
      rest.run([&](int64_t t, int64_t next) {
        if (t < products) return product.run(t, next, thread);
        t -= products;
        if (t < down_grad.tasks())
          return down_grad.run(t, dS_left, rows_here, from(p.x, row0, 0), product.tail_mask, m == 0, packed);
        t -= down_grad.tasks();
        if (t < up_grad.tasks()) return up_grad.run(t, S_left, rows_here, from(p.dy, row0, 0), Mask{}, m == 0, packed);
        t -= up_grad.tasks();
        if (t < core_grad.tasks()) return core_grad.run(t, S1_left, rows_here, Matrix{dS2, r, 1}, Mask{}, m == 0, packed);
        const int64_t col = (t - core_grad.tasks()) * kColumns * k.panel();
        column_dots(k, from(p.dy, row0, col), from(p.z, row0, col), rows_here, std::min(p.N - col, kColumns * k.panel()), m > 0,
                    p.dout_scale + col);
      });
    });
  }

  if (mixed) mixed_gradients(k, p, mixed_dS, all_bits, words, threads, workspace);
  if (p.dgate && dgate != p.dgate) sum_rows(dgate, p.M, r, p.dgate);
  Tasks stores(down_grad.panels() + up_grad.panels() + core_grad.panels());
  parallel(threads, [&](int) {
    stores.run([&](int64_t t) {
      if (t < down_grad.panels()) return down_grad.store(t, 0, p.r, p.dA);
      t -= down_grad.panels();
      if (t >= up_grad.panels()) return core_grad.store(t - up_grad.panels(), 0, r, Matrix{p.dcore, r, 1});
      if (p.dbias.data) up_grad.store(t, up_grad.tiles.total - 1, 1, p.dbias);
      if (scaled_tail) {
        const int64_t col = t * k.panel();
        tail_dots(k, up_grad.sum(t, 0), from(p.lora_B, col, 0), up_grad.cols(t), p.r, p.scaling, p.dout_scale + col);
      }
      if (!p.dB.data) return;
      if (out_scale) k.scale_tile(up_grad.sum(t, 0), static_cast<int>(r), out_scale + t * k.panel());
      up_grad.store_transposed(t, p.r, p.scaling, p.dB);
    });
  });
}

}  // namespace

void lora_backward(const LoraBackward& p) {
  backward_blocks(p, kernels());
}

}  // namespace lora_ops
