#include "gemm.h"

#include "../nf4.h"
#include "mixed.h"

#include <unistd.h>

#include <cstring>

namespace lora_ops {
namespace {

constexpr int64_t kLeftBytes = 12 << 20;  // of a block of M, packed
constexpr int64_t kFlushSteps = 256;      // blocks of the reduction are multiples of the micro-kernel's longest chain
constexpr int64_t kMostGroup = 4;         // panels that a tile of the left operand passes over while it is in L1 / L2
constexpr int64_t kMostKeptGroup = 2;     // the next kept panels come up meanwhile, and have to fit beside them
constexpr int64_t kKeptSteps = 1024;      // block of the reduction in kept panels
constexpr int64_t kTailShare = 8;         // of the steps, that a tail of the product's own tiles may have: it is one chain
constexpr int64_t kLine = 64, kPage = 4096;
#if defined(LORA_OPS_MULTIPLY_ADDS_PER_THREAD)  // tools/sanitize.py
constexpr int64_t kPerThread = LORA_OPS_MULTIPLY_ADDS_PER_THREAD;
#else
constexpr int64_t kPerThread = 1 << 18;
#endif

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

int64_t kept_steps(const Arithmetic& arithmetic) {
  return arithmetic.blocking.steps ? arithmetic.blocking.steps : kKeptSteps;
}

}  // namespace

const Arithmetic& arithmetic_of(const Kernels& k, DType left, DType right) {
  return k.bf16.tile && left == DType::bf16 && right == DType::bf16 ? k.bf16 : k.f32;
}

int64_t block_rows(const Arithmetic& arithmetic, const Steps& steps) {
  if (arithmetic.blocking.rows) return arithmetic.blocking.rows;
  return std::max<int64_t>(8, kLeftBytes / (std::max<int64_t>(steps.left, 1) * 4)) * arithmetic.rows;
}

int useful_threads(int threads, int64_t multiply_adds) {
  return static_cast<int>(std::clamp<int64_t>(multiply_adds / kPerThread, 1, std::max(threads, 1)));
}

void pack_right(const Kernels& k, const Arithmetic& arithmetic, const Matrix& right, int64_t C, int64_t j, int vectors,
                int64_t k0, int64_t count, Mask mask, float* out, int64_t vector_stride) {
  if (right.col_stride == 1) {
    const int64_t cols = std::min<int64_t>(C - j, int64_t{vectors} * k.lanes);
    return arithmetic.pack_straight(from(right, k0, j), cols, count, mask, out, vectors, vector_stride);
  }
  for (int v = 0; v < vectors; ++v, j += k.lanes) {
    const int cols = static_cast<int>(std::clamp<int64_t>(C - j, 0, k.lanes));
    arithmetic.pack_transposed(transposed(from(right, k0, j)), cols, count, out + v * vector_stride);
  }
}

void pack_quantized(const Kernels& k, const Arithmetic& arithmetic, const QuantizedWeight& weight, bool transpose, int64_t C,
                    int64_t j, int vectors, int64_t k0, int64_t count, float* out, int64_t vector_stride, void* buffer) {
  const DType type = arithmetic.k_per_step == 1 ? DType::f32 : DType::bf16;
  const Matrix decoded{buffer, kDecodeStride, 1, type};
  const int64_t group_stride = kWords * size_of(type);
  if (transpose) {  // columns of right are rows of the weight
    for (int v = 0; v < vectors; ++v, j += k.lanes) {
      const int rows = static_cast<int>(std::clamp<int64_t>(C - j, 0, k.lanes));
      for (int64_t s = 0; s < count; s += kMostDecoded) {
        const int64_t here = std::min<int64_t>(kMostDecoded, count - s);
        float* to = out + v * vector_stride + s / arithmetic.k_per_step * k.lanes;
        if (arithmetic.decode_transposed && weight.K % 32 == 0) {
          arithmetic.decode_transposed(weight, j, rows, k0 + s, here, to);
          continue;
        }
        for (int i = 0; i < rows; ++i) k.decode(weight, j + i, k0 + s, here, type, decoded.at(i, 0), group_stride);
        arithmetic.pack_transposed(decoded, rows, here, to);
      }
    }
    return;
  }
  // kDecodeRows are whole steps of every arithmetic: only the last piece is padded.
  const int64_t first = j / kChunk * kChunk, cols = std::min<int64_t>(C - j, int64_t{vectors} * k.lanes);
  for (int64_t s = 0; s < count; s += kDecodeRows) {
    const int64_t here = std::min(kDecodeRows, count - s);
    for (int64_t i = 0; i < here; ++i)
      k.decode(weight, k0 + s + i, first, j + cols - first, type, decoded.at(i, 0), group_stride);
    float* to = out + s / arithmetic.k_per_step * k.lanes;
    arithmetic.pack_straight(from(decoded, 0, j - first), cols, here, Mask{}, to, vectors, vector_stride);
  }
}

void pack_left(const Kernels& k, const Arithmetic& arithmetic, const Matrix& left, int64_t M, int64_t i, int64_t R,
               float* out) {
  const int64_t rows = std::min(Steps::left_vectors(k, arithmetic) * k.lanes, M - i);
  arithmetic.pack_left(from(left, i, 0), static_cast<int>(rows), R, out);
}

void pack_kept(const Kernels& k, const Arithmetic& arithmetic, const Matrix& right, int64_t R, int64_t C, float* panels,
               int threads) {
  const int64_t block = kept_steps(arithmetic) * arithmetic.k_per_step, count = ceil_div(C, k.panel());
  Tasks tasks(count * ceil_div(R, block));
  parallel(threads, [&](int) {
    tasks.run([&](int64_t task) {
      const int64_t k0 = task / count * block, p = task % count;
      const Steps steps(k, arithmetic, std::min(block, R - k0));
      float* out = panels + k0 / arithmetic.k_per_step * k.panel() * count + p * 2 * steps.vector;
      pack_right(k, arithmetic, right, C, p * k.panel(), 2, k0, std::min(block, R - k0), Mask{}, out, steps.vector);
    });
  });
}

void store_transposed(const Kernels& k, const float* sums, int64_t rows, int cols, float scale, const Matrix& out) {
  alignas(64) float c[kMaxTile];
  for (int j0 = 0; j0 < cols; j0 += k.f32.rows) {
    const int height = std::min(k.f32.rows, cols - j0);
    for (int64_t i0 = 0; i0 < rows; i0 += k.panel()) {
      const int width = static_cast<int>(std::min<int64_t>(rows - i0, k.panel()));
      for (int i = 0; i < width; ++i)
        for (int j = 0; j < height; ++j) c[j * k.panel() + i] = scale * sums[(i0 + i) * k.panel() + j0 + j];
      k.store_tile(c, height, width, Matrix{}, from(out, j0, i0));
    }
  }
}

void DownPanels::pack(const Matrix& right, int64_t task) const {
  const int64_t k0 = task * kChunk;
  const int vectors = static_cast<int>(ceil_div(r, k.lanes));
  pack_right(k, k.f32, right, r, 0, vectors, k0, std::min(kChunk, R - k0), Mask{}, data + k0 * k.lanes, R * k.lanes);
}

void DownPanels::scale(const float* scale, int64_t task) const {
  for (int64_t v = 0; v < ceil_div(r, k.lanes); ++v)
    for (int64_t i = task * kChunk; i < std::min((task + 1) * kChunk, R); ++i)
      for (int l = 0; l < k.lanes; ++l) data[(v * R + i) * k.lanes + l] *= scale[i];
}

void DownPanels::multiply(const float* left, int rows, int64_t j, float* c) const {
  k.f32.tile(rows, r - j > k.lanes ? 2 : 1, left, data + j * R, R * k.lanes, R, c, false, kNothingAhead);
}

void UpPanels::pack(const Matrix& right, int64_t task) const {
  const int64_t p0 = task * kChunk, p1 = std::min(p0 + kChunk, ceil_div(C, k.panel()));
  pack_right(k, k.f32, right, C, p0 * k.panel(), static_cast<int>(2 * (p1 - p0)), 0, r, Mask{}, data + p0 * r * k.panel(),
             r * k.lanes);
}

const float* OutScale::padded(const Kernels& k, const float* scale, int64_t C, Workspace& w) {
  if (!scale) return nullptr;
  const int64_t size = ceil_div(C, k.panel()) * k.panel();
  float* out = w.floats(size);
  std::fill(std::copy_n(scale, C, out), out + size, 0.f);
  return out;
}

void Product::plan(int threads) {
  const int64_t count = ceil_div(C, k.panel());
  const int64_t steps = Steps(k, arithmetic, R).count;
  // Panels take half of L2. They come in blocks of the reduction, so that several of them pass over a tile of the left operand
  // while it is near.
  const Blocking& given = arithmetic.blocking;
  int64_t block_steps = kept_steps(arithmetic);
  if (!panels && !given.steps) {
    const int64_t most = std::max(kFlushSteps, l2_bytes() / 2 / (kMostGroup * k.panel() * 4) / kFlushSteps * kFlushSteps);
    block_steps = ceil_div(ceil_div(steps, ceil_div(steps, most)), kFlushSteps) * kFlushSteps;
  }
  const int64_t most_group = given.group ? given.group : panels ? kMostKeptGroup : 2 * kMostGroup;
  k_block = std::min(block_steps * arithmetic.k_per_step, std::max<int64_t>(R, 1));
  group = std::clamp<int64_t>(l2_bytes() / 2 / (std::min(block_steps, steps) * k.panel() * 4), 1, most_group);
  group = std::clamp<int64_t>(count / (8 * threads), 1, group);  // enough groups for an even split
  groups = ceil_div(count, group);
  row_parts = groups >= 2 * threads ? 1 : std::min(tiles.count, ceil_div(2 * threads, groups));

  const bool one_block = !left || k_block >= R;
  const int64_t tiles_kept = one_block ? 1 : ceil_div(tiles.count, row_parts), panels_kept = one_block && !mixed ? 1 : group;
  packed_size = panels || !left ? 0 : 2 * group * padded_vector(std::min(block_steps, steps) * k.lanes);
  if (quantized.codes) packed_size += kDecodeBytes / 4;
  scratch_size = packed_size + tiles_kept * panels_kept * result_size();
  scratch_size = ceil_div(scratch_size, 1024) * 1024 + 16;  // threads a page and a line apart
}

// Kept panels lie in the order of their use: [block of the reduction][panel][2][step][lanes].
const float* Product::kept(int64_t panel, int64_t k0) const {
  const int64_t before = k0 / arithmetic.k_per_step * k.panel() * ceil_div(C, k.panel());
  return panels + before + panel * 2 * Steps(k, arithmetic, std::min(k_block, R - k0)).vector;
}

// c = what is there before the main product, in panels [p0, p1), `stride` floats apart: the low-rank tail, masked on its own,
// unless it comes last; and left · right, where `out` holds it already.
void Product::start(int64_t tile, int64_t p0, int64_t p1, float* c, int64_t stride) const {
  const int rows = static_cast<int>(tiles.size(tile));
  const int64_t row = tiles.start(tile);
  if (mixed) mixed->multiply(tile, tail_left, rows, p0, p1, c, stride);
  for (int64_t p = p0; p < p1; ++p, c += stride) {
    const int64_t col = p * k.panel();
    if (scale.tail_last) {
      std::memset(c, 0, rows * k.panel() * sizeof(float));
    } else if (!mixed) {
      tail->multiply(tail_left + tile * tail->left_size(arithmetic.rows), rows, p, c);
    }
    if (tail_mask.words) k.mask_tile(c, rows, Mask{tail_mask.words + row * tail_mask.row_stride, tail_mask.row_stride, col});
    if (!left) k.load_tile(from(out, row, col), rows, static_cast<int>(std::min<int64_t>(C - col, k.panel())), c);
  }
}

void Product::finish(int64_t tile, int64_t panel, float* c) const {
  const int64_t row = tiles.start(tile), col = panel * k.panel();
  const Matrix b = bias.data ? from(bias, 0, col) : Matrix{};
  const int rows = static_cast<int>(tiles.size(tile)), cols = static_cast<int>(std::min<int64_t>(C - col, k.panel()));
  scale.keep(k, c, rows, cols, row, col);
  if (scale.tail_last) tail->multiply(tail_left + tile * tail->left_size(arithmetic.rows), rows, panel, c, true);
  scale.apply(k, c, rows, col);
  k.store_tile(c, rows, cols, b, from(out, row, col));
}

// The lines of `out` that a tile will be stored to.
void Product::fetch_out(int64_t tile, int64_t panel) const {
  const int64_t bytes = std::min<int64_t>(C - panel * k.panel(), k.panel()) * size_of(out.dtype);
  for (const Matrix* m : {&out, &scale.unscaled})
    for (int64_t i = tiles.start(tile); m->data && i < tiles.start(tile) + tiles.size(tile); ++i)
      for (int64_t b = 0; b < bytes; b += kLine) __builtin_prefetch(m->at(i, panel * k.panel()) + b, 1, 2);
}

// What call `call` of `calls`, of so many steps, brings up of the part of the right operand that block k0 of `task` will pack.
void Product::fetch_right(int64_t task, int64_t k0, int64_t call, int64_t calls, int64_t steps, Ahead& ahead) const {
  const int64_t col = first_panel(task) * k.panel(), columns = std::min(last_panel(task) * k.panel(), C) - col;
  const int64_t count = std::min(k_block, R - k0), element = size_of(right.dtype);
  const bool codes = quantized.codes;
  ahead.right = nullptr;
  if (codes ? transpose : right.row_stride == 1) {
    // Columns are rows of the weight, one behind the other: a stretch of them for each call, or the block's part of one row.
    const char* weight = codes ? reinterpret_cast<const char*>(quantized.codes) : right.at(0, 0);
    const int64_t row = codes ? row_bytes(R) : right.col_stride * element;
    const bool whole = count == R && (codes || right.col_stride == R);
    const int64_t share = whole ? ceil_div(columns * row, calls) : codes ? count / 2 : count * element;
    const int64_t begin = whole ? call * share : call * columns / calls * row + (codes ? k0 / 2 : k0 * element);
    ahead.right = weight + col * row + begin;
    ahead.right_step = ceil_div(share, steps);
  } else if (!codes && right.col_stride == 1 && right.row_stride * element % kPage && arithmetic.multiple == 1) {
    // A line of a panel at each step, row after row: one or two of the last tiles' calls. Not of rows whole pages apart, which
    // share a few sets of L2.
    const int64_t panels_here = ceil_div(columns, k.panel()), nth = (calls - 1 - call) / panels_here;
    const int64_t line = nth / arithmetic.k_per_step * kLine;
    if (line >= k.panel() * element) return;
    ahead.right = right.at(k0 + nth % arithmetic.k_per_step, col + call % panels_here * k.panel()) + line;
    ahead.right_step = right.row_stride * element * arithmetic.k_per_step;
  }
}

void Product::run(int64_t task, int64_t next, int thread) const {
  const Parts row_split(tiles.count, ceil_div(tiles.count, row_parts));
  const int64_t part = task % row_parts;
  if (part >= row_split.count) return;
  const int64_t tile0 = row_split.start(part), tile1 = tile0 + row_split.size(part);
  const int64_t p0 = first_panel(task), p1 = last_panel(task);
  float* results = scratch + thread * scratch_size;
  if (!left || R == 0) {
    for (int64_t t = tile0; t < tile1; ++t)
      for (int64_t p = p0; p < p1; ++p) start(t, p, p + 1, results, 0), finish(t, p, results);
    return;
  }
  const Steps steps(k, arithmetic, R);
  if (arithmetic.begin) arithmetic.begin();
  const bool one_block = k_block >= R;
  const int64_t result_stride = one_block && !mixed ? 0 : result_size();
  float* packed = scratch + (thread + 1) * scratch_size - packed_size - 16;
  const int64_t left_step = steps.left / steps.count, panels_here = p1 - p0, calls = (tile1 - tile0) * panels_here;
  for (int64_t k0 = 0; k0 < R; k0 += k_block) {
    const int64_t count = std::min(k_block, R - k0), first = k0 / arithmetic.k_per_step;
    const Steps block_steps(k, arithmetic, count);
    const int64_t vector_stride = panels ? block_steps.vector : padded_vector(block_steps.vector);
    if (!panels) {
      const int vectors = static_cast<int>(2 * panels_here);
      if (quantized.codes) {
        float* buffer = packed + packed_size - kDecodeBytes / 4;
        pack_quantized(k, arithmetic, quantized, transpose, C, p0 * k.panel(), vectors, k0, count, packed, vector_stride,
                       buffer);
      } else {
        pack_right(k, arithmetic, right, C, p0 * k.panel(), vectors, k0, count, Mask{}, packed, vector_stride);
      }
    }
    // What the next block of the reduction will read, of this task or the next: every tile brings up its share.
    const bool last = k0 + count == R;
    const int64_t next_task = last ? next : task, next_k0 = last ? 0 : k0 + count;
    const Steps next_steps(k, arithmetic, next_task < tasks() ? std::min(k_block, R - next_k0) : 0);
    const int64_t left_share = ceil_div(next_steps.count * left_step * 4, panels_here);
    const int64_t panels_share = panels ? ceil_div(next_steps.vector * 2 * panels_here * 4, calls) : 0;
    Ahead ahead;
    ahead.left_step = ceil_div(left_share, block_steps.count);
    ahead.right_step = ceil_div(panels_share, block_steps.count);
    if (panels_share) ahead.right = reinterpret_cast<const char*>(kept(first_panel(next_task), next_k0));

    const bool plain_tail = !mixed && !scale.tail_last && !tail_mask.words;
    const bool tail_in_tile = k0 == 0 && plain_tail && arithmetic.tile_with_tail && tail->r <= R / kTailShare;
    const bool fetches_right = next_steps.count && !panels;
    int64_t call = 0;

    for (int64_t t = tile0; t < tile1; ++t) {
      const float* tile_left = left + t * steps.left + first * left_step;
      ahead.left = reinterpret_cast<const char*>(left + t * steps.left + next_k0 / arithmetic.k_per_step * left_step);
      float* of_tile = one_block ? results : results + (t - tile0) * group * result_size();
      MixedRows::Pieces pieces;
      if (mixed) {
        if (k0 == 0) start(t, p0, p1, of_tile, result_stride);  // B and A of a row are read in long pieces
        if (k0 == 0 && t + 1 < tile1) {
          pieces = mixed->pieces(t + 1, p0, p1);
        } else if (last && t + 1 == tile1 && next < tasks()) {
          pieces = mixed->pieces(row_split.start(next % row_parts), first_panel(next), last_panel(next));
        }
      }
      for (int64_t p = p0; p < p1; ++p) {
        float* c = of_tile + (p - p0) * result_stride;
        const float* panel = panels ? kept(p, k0) : packed + (p - p0) * 2 * vector_stride;
        const bool begun = k0 > 0 || !scale.tail_last;  // else the product itself begins c
        if (k0 == 0 && begun && !mixed && !tail_in_tile) start(t, p, p + 1, c, 0);
        if (last) fetch_out(t, p);
        if (mixed) mixed->fetch(pieces, block_steps.count, ahead);
        if (fetches_right) fetch_right(next_task, next_k0, call++, calls, block_steps.count, ahead);
        const int rows = static_cast<int>(tiles.size(t));
        if (tail_in_tile) {
          arithmetic.tile_with_tail(rows, tail->steps(tail_left + t * tail->left_size(arithmetic.rows), p), tile_left, panel,
                                    vector_stride, block_steps.count, c, ahead);
        } else {
          arithmetic.tile(rows, 2, tile_left, panel, vector_stride, block_steps.count, c, begun, ahead);
        }
        if (last) finish(t, p, c);
        ahead.left += left_share;
        ahead.right += panels_share;
      }
    }
  }
  if (arithmetic.end) arithmetic.end();
}

}  // namespace lora_ops
