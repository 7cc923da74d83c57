// S = drop(x) Aᵀ ;  y = out_scale ∘ (x W0ᵀ + scaling · ((S ∘ gate) core) Bᵀ) + bias
//
// For each block of rows: every row tile of x is packed once, multiplied by A while it is hot (S, and scaling · S as the
// left operand of the tail), and then the product of gemm.h runs with S Bᵀ as r more steps in the same accumulators: y is
// scaled, rounded and stored once. Gate and core act on the tail's left operand. With dropout, S is taken from a masked copy of
// the tile; the mask lives as long as the tile does.
//
// With few rows a packed weight would be used too rarely to pay for its packing: its rows are read where they lie, or decoded
// in strips (strip.h).
#include "../nf4.h"
#include "dispatch.h"
#include "gemm.h"
#include "middle.h"
#include "mixed.h"
#include "strip.h"

#include <cstring>
#include <optional>

namespace lora_ops {
namespace {

constexpr int64_t kDotBytes = 32 << 10;  // of x in a block of the reduction: it stays in L1
constexpr int64_t kShortAhead = 4096;    // bytes that B is fetched ahead, between panels of the weight

bool in_pairs(const LoraForward& p, const Kernels& k) {
  return k.pairs.dot && p.x.dtype == DType::bf16 && p.weight.dtype == DType::bf16;
}

bool few_rows(const LoraForward& p, const Kernels& k) {
  if (Strips::fit(p, k)) return true;
  const bool bf16 = p.x.dtype == DType::bf16;
  if (p.quantized.codes) return p.M <= (bf16 ? k.few_rows_bf16 : k.few_rows).codes && p.K % 32 == 0;
  const FewRows& most = in_pairs(p, k) ? k.few_rows_bf16 : k.few_rows;
  return p.weight.data && p.weight.col_stride == 1 && p.M <= (p.panels ? most.panels : most.dense);
}

// S of a tile's rows from its packed fp32 elements: stored as it is, and times `scaling` as the tail's left operand.
void down(const Kernels& k, const DownPanels& a, const float* tile, int rows, float keep_scale, float scaling, float* S,
          float* tail_left) {
  alignas(64) float c[kMaxTile];
  for (int64_t j0 = 0; j0 < a.r; j0 += k.panel()) {
    a.multiply(tile, rows, j0, c);
    for (int64_t j = j0; j < std::min(a.r, j0 + k.panel()); ++j)
      for (int i = 0; i < rows; ++i) {
        const float s = c[i * k.panel() + j - j0] * keep_scale;
        S[i * a.r + j] = s;
        tail_left[j * k.lanes + i] = scaling * s;
      }
  }
}

// In half precision z is x W0ᵀ, which is rounded, without a tail, which is not: as much as eager PyTorch rounds.
bool tail_last(const LoraForward& p) {
  return (p.out_scale || p.z.data) && p.x.dtype != DType::f32;
}

void forward_blocks(const LoraForward& p, const Kernels& k) {
  const bool product_here = p.weight.data || p.quantized.codes;
  const Arithmetic& arithmetic =
      product_here ? arithmetic_of(k, p.x.dtype, p.quantized.codes ? p.x.dtype : p.weight.dtype) : k.f32;
  const Steps steps(k, arithmetic, p.K);
  const Parts blocks(p.M, block_rows(arithmetic, steps));
  const int threads = useful_threads(p.threads, p.M * p.K * (product_here ? p.N : p.r));
  const int64_t words = mask_words(p.K);
  const bool own_tile = p.dropout.threshold || arithmetic.k_per_step > 1;  // S needs another tile than the product
  const bool mixed = p.mixed.ids;
  const int64_t own_size = mixed ? MixedRows::forward_size(k, p) : own_tile ? p.K * k.lanes + words * k.lanes : 0;

  Workspace workspace;
  const DownPanels a(k, p.K, mixed ? 0 : p.r, workspace);
  const UpPanels b(k, mixed ? 0 : p.r, p.N, workspace);
  const int64_t most_tiles = Parts(blocks.size(0), arithmetic.rows).count;
  float* left = workspace.floats(most_tiles * steps.left);
  float* tail_left = workspace.floats(mixed ? blocks.size(0) * p.r * k.lanes : most_tiles * b.left_size(arithmetic.rows));
  float* own = workspace.floats(own_size * threads);
  const MiddleOf middle(k, p.middle, p.r, false, threads, workspace);
  const float* scale = OutScale::padded(k, p.out_scale, p.N, workspace);
  float* scratch = nullptr;  // of the first block: no later one is larger

  Tasks adapters(mixed ? 0 : a.tasks() + b.tasks());
  for (int64_t m = 0; m < blocks.count; ++m) {
    Product product{k, arithmetic, Parts(blocks.size(m), arithmetic.rows), p.K, p.N};
    product.left = product_here ? left : nullptr;
    product.right = transposed(p.weight);
    product.quantized = p.quantized;
    product.transpose = true;
    product.panels = p.panels;
    product.tail_left = tail_left;
    product.tail = &b;
    product.scale = {scale, p.z.data ? from(p.z, blocks.start(m), 0) : Matrix{}, tail_last(p)};
    product.bias = p.bias;
    product.out = from(p.y, blocks.start(m), 0);
    std::optional<const MixedRows> rows_of;
    if (mixed) product.mixed = &rows_of.emplace(k, p.mixed, Side::up_B, p.r, p.N, blocks.start(m), product.tiles);
    product.plan(threads);
    product.scratch = scratch = m == 0 ? workspace.floats(product.scratch_size * threads) : scratch;

    const auto pack_and_down = [&](int64_t t, int thread) {
      const int rows = static_cast<int>(product.tiles.size(t));
      const int64_t row = blocks.start(m) + product.tiles.start(t);
      float* tile = left + t * steps.left;
      if (product.left || !own_tile) pack_left(k, arithmetic, p.x, p.M, row, p.K, tile);
      if (mixed) return rows_of->down(t, p, own + thread * own_size, tail_left);
      each_f32_tile(k, rows, [&](int64_t first, int rows_here) {
        if (own_tile) {
          tile = own + thread * own_size;
          if (product.left && arithmetic.widen_left) {
            arithmetic.widen_left(left + t * steps.left, p.K, nullptr, tile);
          } else {
            pack_left(k, k.f32, p.x, p.M, row + first, p.K, tile);
          }
          if (p.dropout.threshold) {
            uint32_t* bits = reinterpret_cast<uint32_t*>(tile + p.K * k.lanes);
            for (int i = 0; i < rows_here; ++i) k.dropout_mask(p.dropout, row + first + i, p.K, bits + i * words);
            k.mask_left(tile, rows_here, p.K, Mask{bits, words});
          }
        }
        float* tail = tail_left + t * b.left_size(arithmetic.rows) + b.left_at(first);
        down(k, a, tile, rows_here, p.dropout.keep_scale, p.scaling, p.S + (row + first) * p.r, tail);
        if (middle.present()) middle.forward(row + first, rows_here, tail, thread);
      });
    };

    Tasks tiles(product.tiles.count), groups(product.tasks());
    parallel(threads, [&](int thread) {
      adapters.run(
          [&](int64_t t) { t < a.tasks() ? a.pack(transposed(p.lora_A), t) : b.pack(transposed(p.lora_B), t - a.tasks()); });
      sync();
      tiles.run([&](int64_t t) { pack_and_down(t, thread); });
      sync();
      groups.run([&](int64_t t, int64_t next) { product.run(t, next, thread); });
    });
  }
}

void forward_few_rows(const LoraForward& p, const Kernels& k) {
  // Few rows by 4-bit weights are multiplied before another thread is awake.
  const int threads = useful_threads(p.threads, p.M * p.K * p.N / (p.quantized.codes ? 4 : 1));
  const int64_t stride = ceil_div(p.K, kChunk) * kChunk;  // a multiple of every panel too
  const bool codes = p.quantized.codes, in_strips = Strips::fit(p, k), pairs = !codes && !in_strips && in_pairs(p, k);
  const bool same = !p.dropout.threshold && !codes && !in_strips && !pairs &&
                    (p.lora_A.dtype == DType::bf16) == (p.weight.dtype == DType::bf16);
  const DotCodes& dots = p.x.dtype == DType::bf16 && p.M <= k.few_rows_bf16.rounded ? k.codes_bf16 : k.codes;
  const int64_t element = codes ? dots.element : pairs ? sizeof(uint16_t) : sizeof(float);  // bytes, of x in `left`
  const int64_t words = p.dropout.threshold ? mask_words(p.K) : 0;
  const Parts tiles(p.M, std::min(kDotRows, k.lanes / 2));  // two rows of the weight at a time: each load of x serves both

  const bool mixed = p.mixed.ids;
  const int64_t own_size = mixed ? MixedRows::forward_size(k, p) : 0;

  const bool one = p.M == 1 && !mixed && p.lora_B.col_stride == 1;  // B is used once, too: its rows are read where they lie
  const int64_t whole_r = ceil_div(p.r, k.lanes) * k.lanes;

  Workspace workspace;
  const UpPanels b(k, mixed || one ? 0 : p.r, p.N, workspace);
  float* left = workspace.floats((p.M + kDotRows) * stride);  // rows that `dot` rounds up to are read, not used
  float* dropped = same || mixed ? left : workspace.floats((p.M + kDotRows) * stride);
  uint32_t* bits = workspace.words(p.M * words);
  float* tail_left = workspace.floats((mixed ? p.M : tiles.count) * p.r * k.lanes);
  float* own = workspace.floats((one ? whole_r : own_size) * threads);
  std::optional<const MixedRows> rows_of;
  if (mixed) rows_of.emplace(k, p.mixed, Side::up_B, p.r, p.N, 0, tiles);
  const MiddleOf middle(k, p.middle, p.r, false, threads, workspace);
  const OutScale scale{OutScale::padded(k, p.out_scale, p.N, workspace), p.z, tail_last(p)};
  std::optional<const Strips> strips;
  if (in_strips) strips.emplace(k, p, threads, workspace);
  const int64_t panels = ceil_div(p.N, k.panel()), r_panels = ceil_div(p.r, k.panel());
  // One row streams through whole rows of W0; more are cut so that their block of x stays in L1.
  const int64_t blocks = p.M <= 2 ? 1 : ceil_div(tiles.size(0) * stride * element, kDotBytes);
  const int64_t k_block = ceil_div(ceil_div(stride, blocks), kChunk) * kChunk;

  const auto order = [&](int64_t i) {
    Mask mask;
    const Matrix row = from(p.x, i, 0);
    if (in_strips) {
      // packed below
    } else if (codes) {
      dots.order(row, p.K, mask, left + i * stride);
    } else if (pairs) {
      k.pairs.order(row, p.K, mask, left + i * stride);
    } else {
      k.dot_order(row, p.K, mask, p.weight.dtype, left + i * stride);
    }
    if (same || mixed) return;
    if (words) {
      k.dropout_mask(p.dropout, i, p.K, bits + i * words);
      mask = Mask{bits + i * words, words};
    }
    k.dot_order(row, p.K, mask, p.lora_A.dtype, dropped + i * stride);
  };
  const auto down = [&](int64_t task) {
    const int64_t t = task / r_panels, j0 = task % r_panels * k.panel(), row = tiles.start(t);
    const int rows = static_cast<int>(tiles.size(t)), cols = static_cast<int>(std::min<int64_t>(p.r - j0, k.panel()));
    alignas(64) float c[kMaxTile] = {};
    k.dot(rows, dropped + row * stride, stride, from(p.lora_A, j0, 0), cols, p.K, c);
    float* tail = tail_left + t * p.r * k.lanes;
    for (int j = 0; j < cols; ++j)
      for (int i = 0; i < k.lanes; ++i) {
        const float s = i < rows ? c[i * k.panel() + j] * p.dropout.keep_scale : 0.f;
        if (i < rows) p.S[(row + i) * p.r + j0 + j] = s;
        tail[(j0 + j) * k.lanes + i] = p.scaling * s;
      }
  };
  const auto product = [&](int64_t panel, int thread) {
    const int64_t col = panel * k.panel();
    const int cols = static_cast<int>(std::min<int64_t>(p.N - col, k.panel()));
    const float* products = strips ? strips->run(col, cols, thread) : nullptr;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int rows = static_cast<int>(tiles.size(t));
      alignas(64) float c[kMaxTile], tail_c[kMaxTile];
      float* tail = scale.tail_last ? tail_c : c;
      if (mixed) {
        rows_of->multiply(t, tail_left, rows, panel, panel + 1, tail, 0);
      } else if (one) {
        k.dot_short(own + thread * whole_r, from(p.lora_B, col, 0), cols, p.r, tail, kShortAhead);
      } else {
        b.multiply(tail_left + t * p.r * k.lanes, rows, panel, tail);
      }
      if (scale.tail_last) std::memset(c, 0, rows * k.panel() * sizeof(float));
      if (strips) strips->add(products, tiles.start(t), rows, cols, c);
      for (int64_t k0 = 0; k0 < p.K && !strips; k0 += k_block) {
        const float* x = left + tiles.start(t) * stride + k0 * element / int64_t{sizeof(float)};
        const int64_t count = std::min(k_block, p.K - k0);
        if (codes) {
          dots.dot(rows, x, stride, p.quantized, col, cols, k0, count, c);
        } else if (pairs) {
          k.pairs.dot(rows, x, stride, from(p.weight, col, k0), cols, count, c, nullptr);
        } else {
          k.dot(rows, x, stride, from(p.weight, col, k0), cols, count, c);
        }
      }
      scale.keep(k, c, rows, cols, tiles.start(t), col);
      if (scale.tail_last) k.load_tile(Matrix{tail, k.panel(), 1}, rows, cols, c);
      scale.apply(k, c, rows, col);
      k.store_tile(c, rows, cols, p.bias.data ? from(p.bias, 0, col) : Matrix{}, from(p.y, tiles.start(t), col));
    }
  };

  const int64_t pieces = mixed ? tiles.count : tiles.count * r_panels, packs = mixed || one ? 0 : b.tasks();
  Tasks prepare(p.M + packs + (strips ? strips->tasks() : 0)), downs(pieces), products(panels);
  Tasks middles(middle.present() ? tiles.count : 0);
  parallel(threads, [&](int thread) {
    prepare.run([&](int64_t t) {
      if (t < p.M) return order(t);
      t -= p.M;
      if (t < packs) return b.pack(transposed(p.lora_B), t);
      strips->pack_x(t - packs);
    });
    sync();
    downs.run([&](int64_t task) { mixed ? rows_of->down(task, p, own + thread * own_size, tail_left) : down(task); });
    sync();
    if (middle.present()) {
      middles.run([&](int64_t t) {
        middle.forward(tiles.start(t), static_cast<int>(tiles.size(t)), tail_left + t * p.r * k.lanes, thread);
      });
      sync();
    }
    if (one) {
      float* in_order = own + thread * whole_r;
      for (int64_t j = 0; j < whole_r; ++j) in_order[j] = j < p.r ? tail_left[j * k.lanes] : 0.f;
    }
    products.run([&](int64_t panel) { product(panel, thread); });
  });
}

}  // namespace

void lora_forward(const LoraForward& p) {
  if (p.M == 0 || p.N == 0) return;
  const Kernels& k = kernels();
  few_rows(p, k) ? forward_few_rows(p, k) : forward_blocks(p, k);
}

int64_t packed_size(const Kernels& k, int64_t N, int64_t K, DType x, DType weight) {
  return ceil_div(N, k.panel()) * 2 * Steps(k, arithmetic_of(k, x, weight), K).vector;
}

void pack_weight(const Matrix& weight, int64_t N, int64_t K, DType x, float* panels, int threads) {
  const Kernels& k = kernels();
  pack_kept(k, arithmetic_of(k, x, weight.dtype), transposed(weight), K, N, panels, threads);
}

void dropout_mask(const Dropout& dropout, int64_t rows, int64_t cols, uint32_t* words) {
  const Kernels& k = kernels();
  for (int64_t i = 0; i < rows; ++i) k.dropout_mask(dropout, i, cols, words + i * mask_words(cols));
}

}  // namespace lora_ops
