#include "gemm.h"

#include <unistd.h>

namespace lora_ops {
namespace {

constexpr int64_t kLeftBytes = 12 << 20;
constexpr int64_t kFlushSteps = 256;  // blocks of the reduction are multiples of the micro-kernel's own flush

int64_t l2_bytes() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const int64_t n = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (n > 0) return n;
#endif
    return int64_t{1} << 20;
  }();
  return bytes;
}

}  // namespace

const Arithmetic& arithmetic_of(const Kernels& k, DType left, DType right) {
  return k.bf16.tile && left == DType::bf16 && right == DType::bf16 ? k.bf16 : k.f32;
}

int64_t block_rows(const Kernels& k, const Steps& steps) {
  return std::max<int64_t>(8, kLeftBytes / (steps.tile(k) * 4)) * k.rows;
}

int useful_threads(int threads, int64_t multiply_adds) {
  return static_cast<int>(std::clamp<int64_t>(multiply_adds >> 18, 1, std::max(threads, 1)));
}

void pack_panel(const Kernels& k, const Arithmetic& arithmetic, const Matrix& right, int64_t C, int64_t j, int64_t k0, int64_t count,
                Mask mask, float* out, int width) {
  if (right.col_stride == 1) {
    const int cols = static_cast<int>(std::min<int64_t>(C - j, width));
    return arithmetic.pack_straight(from(right, k0, j), cols, count, mask, out, width);
  }
  for (int v = 0; v < width; v += k.lanes) {
    const int cols = static_cast<int>(std::clamp<int64_t>(C - j - v, 0, k.lanes));
    arithmetic.pack_transposed(transposed(from(right, k0, j + v)), cols, count, mask, out + v, width);
  }
}

void pack_left(const Arithmetic& arithmetic, const Matrix& left, int64_t i, int rows, int64_t R, Mask mask, float* out, int lanes) {
  arithmetic.pack_transposed(from(left, i, 0), rows, R, mask, out, lanes);
}

void DownPanels::pack(const Matrix& right, int64_t task) const {
  const int64_t k0 = task * kChunk, count = std::min(kChunk, R - k0);
  for (int64_t p = 0; p < this->count(); ++p) {
    const int width = vectors(p) * k.lanes;
    pack_panel(k, k.f32, right, r, p * k.panel(), k0, count, Mask{}, panel(p) + k0 * width, width);
  }
}

void UpPanels::pack(const Matrix& right, int64_t task) const {
  for (int64_t p = task * kChunk; p < std::min((task + 1) * kChunk, ceil_div(C, k.panel())); ++p) {
    pack_panel(k, k.f32, right, C, p * k.panel(), 0, r, Mask{}, panel(p), k.panel());
  }
}

void Product::plan(int threads) {
  const int64_t count = ceil_div(C, k.panel());
  const int64_t steps = Steps(arithmetic, R).count;
  const int64_t most_steps = std::max(kFlushSteps, l2_bytes() / 2 / (k.panel() * 4) / kFlushSteps * kFlushSteps);
  const int64_t block_steps = ceil_div(ceil_div(steps, ceil_div(steps, most_steps)), kFlushSteps) * kFlushSteps;
  k_block = std::min(block_steps * arithmetic.k_per_step, std::max<int64_t>(R, 1));
  group = std::clamp<int64_t>(l2_bytes() / 2 / (std::min(block_steps, steps) * k.panel() * 4), 1, 4);
  group = std::clamp<int64_t>(count / (8 * threads), 1, group);  // enough groups for an even split
  groups = ceil_div(count, group);
  row_parts = groups >= 2 * threads ? 1 : std::min(tiles.count, ceil_div(2 * threads, groups));

  const bool one_block = !left || k_block >= R;
  scratch_size = (panels || !left ? 0 : group * std::min(block_steps, steps) * k.panel()) +
                 (one_block ? 1 : group * ceil_div(tiles.count, row_parts)) * result_size();
  scratch_size = ceil_div(scratch_size, 1024) * 1024 + 16;  // threads a page and a line apart
}

// c = what is there before the main product: nothing, or what `out` holds; and the low-rank tail, masked on its own.
void Product::start(int64_t tile, int64_t panel, float* c) const {
  const int rows = static_cast<int>(tiles.size(tile));
  const int64_t row = tiles.start(tile), col = panel * k.panel();
  k.f32.tile(rows, 2, tail_left + tile * tail->r * k.lanes, tail->panel(panel), tail->r, c, false);
  if (tail_mask.words) k.mask_tile(c, rows, Mask{tail_mask.words + row * tail_mask.row_stride, tail_mask.row_stride, col});
  if (!left) k.load_tile(from(out, row, col), rows, static_cast<int>(std::min<int64_t>(C - col, k.panel())), c);
}

void Product::finish(int64_t tile, int64_t panel, float* c) const {
  const int64_t row = tiles.start(tile), col = panel * k.panel();
  const Matrix b = bias.data ? from(bias, 0, col) : Matrix{};
  k.store_tile(c, static_cast<int>(tiles.size(tile)), static_cast<int>(std::min<int64_t>(C - col, k.panel())), b, from(out, row, col));
}

void Product::run(int64_t task, int thread) const {
  const Parts row_split(tiles.count, ceil_div(tiles.count, row_parts));
  const int64_t part = task % row_parts;
  if (part >= row_split.count) return;
  const int64_t tile0 = row_split.start(part), tile1 = tile0 + row_split.size(part);
  const int64_t p0 = task / row_parts * group, p1 = std::min(p0 + group, ceil_div(C, k.panel()));
  float* results = scratch + thread * scratch_size;
  if (!left) {
    for (int64_t t = tile0; t < tile1; ++t)
      for (int64_t p = p0; p < p1; ++p) start(t, p, results), finish(t, p, results);
    return;
  }
  const Steps steps(arithmetic, R);
  const bool one_block = k_block >= R;
  float* packed = results + (one_block ? 1 : (tile1 - tile0) * group) * result_size();
  for (int64_t k0 = 0; k0 < R; k0 += k_block) {
    const int64_t count = std::min(k_block, R - k0), first = k0 / arithmetic.k_per_step;
    const int64_t block_steps = Steps(arithmetic, count).count;
    if (!panels) {
      for (int64_t p = p0; p < p1; ++p) {
        pack_panel(k, arithmetic, right, C, p * k.panel(), k0, count, Mask{}, packed + (p - p0) * block_steps * k.panel(), k.panel());
      }
    }
    for (int64_t t = tile0; t < tile1; ++t) {
      const float* tile_left = left + t * steps.tile(k) + first * k.lanes;
      for (int64_t p = p0; p < p1; ++p) {
        float* c = one_block ? results : results + ((t - tile0) * group + p - p0) * result_size();
        const float* panel = panels ? panels + p * steps.panel(k) + first * k.panel() : packed + (p - p0) * block_steps * k.panel();
        if (k0 == 0) start(t, p, c);
        arithmetic.tile(static_cast<int>(tiles.size(t)), 2, tile_left, panel, block_steps, c, true);
        if (k0 + count == R) finish(t, p, c);
      }
    }
  }
}

}  // namespace lora_ops
