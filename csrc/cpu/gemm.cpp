#include "gemm.h"

#include <unistd.h>

namespace lora_ops {
namespace {

constexpr int64_t kLeftBytes = 12 << 20;
constexpr int64_t kFlushSteps = 256;  // blocks of the reduction are multiples of the micro-kernel's own flush
constexpr int64_t kMostGroup = 4;     // panels that a tile of the left operand passes over while it is in L1 / L2
constexpr int64_t kLine = 64;
constexpr int64_t kPieceLines = 32;  // lines of a piece: about what the core can have in flight

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
  return std::max<int64_t>(8, kLeftBytes / (std::max<int64_t>(steps.vector, 1) * 4)) * k.rows;
}

int useful_threads(int threads, int64_t multiply_adds) {
  return static_cast<int>(std::clamp<int64_t>(multiply_adds >> 18, 1, std::max(threads, 1)));
}

void pack_right(const Kernels& k, const Arithmetic& arithmetic, const Matrix& right, int64_t C, int64_t j, int vectors, int64_t k0,
                int64_t count, Mask mask, float* out, int64_t vector_stride) {
  if (right.col_stride == 1) {
    const int64_t cols = std::min<int64_t>(C - j, int64_t{vectors} * k.lanes);
    return arithmetic.pack_straight(from(right, k0, j), cols, count, mask, out, vectors, vector_stride);
  }
  for (int v = 0; v < vectors; ++v, j += k.lanes) {
    const int cols = static_cast<int>(std::clamp<int64_t>(C - j, 0, k.lanes));
    arithmetic.pack_transposed(transposed(from(right, k0, j)), cols, count, mask, out + v * vector_stride);
  }
}

void pack_left(const Kernels& k, const Arithmetic& arithmetic, const Matrix& left, int64_t M, int64_t i, int64_t R, Mask mask, float* out) {
  arithmetic.pack_transposed(from(left, i, 0), static_cast<int>(std::min<int64_t>(k.lanes, M - i)), R, mask, out);
}

void DownPanels::pack(const Matrix& right, int64_t task) const {
  const int64_t k0 = task * kChunk;
  const int vectors = static_cast<int>(ceil_div(r, k.lanes));
  pack_right(k, k.f32, right, r, 0, vectors, k0, std::min(kChunk, R - k0), Mask{}, data + k0 * k.lanes, R * k.lanes);
}

void DownPanels::multiply(const float* left, int rows, int64_t j, float* c) const {
  k.f32.tile(rows, r - j > k.lanes ? 2 : 1, left, data + j * R, R * k.lanes, R, c, false);
}

void UpPanels::pack(const Matrix& right, int64_t task) const {
  const int64_t p0 = task * kChunk, p1 = std::min(p0 + kChunk, ceil_div(C, k.panel()));
  pack_right(k, k.f32, right, C, p0 * k.panel(), static_cast<int>(2 * (p1 - p0)), 0, r, Mask{}, data + p0 * r * k.panel(), r * k.lanes);
}

void PanelStream::start(const Kernels& k, const Arithmetic& arithmetic, const Matrix& right, int64_t C, int64_t p0, int64_t p1,
                        int64_t k0, int64_t count, float* out, int64_t calls) {
  k_ = &k, arithmetic_ = &arithmetic, right_ = right, C_ = C, p0_ = p0, p1_ = p1, k0_ = k0, count_ = count, out_ = out;
  straight_ = right.col_stride == 1;
  const int64_t line = kLine / size_of(right.dtype);  // elements
  rows_ = straight_ ? std::max<int64_t>(2, kPieceLines / ceil_div((p1 - p0) * k.panel(), line) / 2 * 2)  // of all the panels
                    : std::max<int64_t>(1, kPieceLines / k.lanes) * line;                             // of one vector
  pieces_ = ceil_div(count, rows_) * (straight_ ? 1 : (p1 - p0) * 2);
  done_ = 0;
  per_call_ = ceil_div(pieces_, std::max<int64_t>(calls, 1));
}

PanelStream::Piece PanelStream::piece(int64_t index) const {
  const int64_t along = ceil_div(count_, rows_), v = straight_ ? 0 : index / along, i = index % along * rows_;
  const int vectors = straight_ ? static_cast<int>(2 * (p1_ - p0_)) : 1;
  return {k0_ + i, std::min(rows_, count_ - i), p0_ * k_->panel() + v * k_->lanes, vectors, v};
}

void PanelStream::pack(int64_t index) const {
  const Piece p = piece(index);
  const int64_t stride = Steps(*k_, *arithmetic_, count_).vector;
  float* out = out_ + p.vector * stride + (p.row - k0_) / arithmetic_->k_per_step * k_->lanes;
  pack_right(*k_, *arithmetic_, right_, C_, p.col, p.vectors, p.row, p.rows, Mask{}, out, stride);
}

void PanelStream::fetch(int64_t index) const {
  const Piece p = piece(index);
  const int64_t row_end = p.row + p.rows, col_end = std::min(p.col + p.vectors * k_->lanes, C_);
  const int64_t line = kLine / size_of(right_.dtype), row_step = straight_ ? 1 : line, col_step = straight_ ? line : 1;
  for (int64_t i = p.row; i < row_end; i += row_step)
    for (int64_t j = p.col; j < col_end; j += col_step) __builtin_prefetch(right_.at(i, j), 0, 2);
}

void PanelStream::some() {
  const int64_t until = std::min(done_ + per_call_, pieces_);
  for (; done_ < until; ++done_) pack(done_);
  for (int64_t ahead = done_; ahead < std::min(done_ + per_call_, pieces_); ++ahead) fetch(ahead);
}

const float* PanelStream::all() {
  for (; done_ < pieces_; ++done_) {
    if (done_ + 1 < pieces_) fetch(done_ + 1);
    pack(done_);
  }
  return out_;
}

void Product::plan(int threads) {
  const int64_t count = ceil_div(C, k.panel());
  const int64_t steps = Steps(k, arithmetic, R).count;
  // Panels in use and panels being packed share half of L2.
  const int64_t most_steps = std::max(kFlushSteps, l2_bytes() / 4 / (kMostGroup * k.panel() * 4) / kFlushSteps * kFlushSteps);
  const int64_t block_steps = ceil_div(ceil_div(steps, ceil_div(steps, most_steps)), kFlushSteps) * kFlushSteps;
  k_block = std::min(block_steps * arithmetic.k_per_step, std::max<int64_t>(R, 1));
  group = std::clamp<int64_t>(l2_bytes() / 4 / (std::min(block_steps, steps) * k.panel() * 4), 1, 2 * kMostGroup);
  group = std::clamp<int64_t>(count / (8 * threads), 1, group);  // enough groups for an even split
  groups = ceil_div(count, group);
  row_parts = groups >= 2 * threads ? 1 : std::min(tiles.count, ceil_div(2 * threads, groups));

  const bool one_block = !left || k_block >= R;
  packed_size = panels || !left ? 0 : group * std::min(block_steps, steps) * k.panel();
  scratch_size = 2 * packed_size + (one_block ? 1 : group * ceil_div(tiles.count, row_parts)) * result_size();
  scratch_size = ceil_div(scratch_size, 1024) * 1024 + 16;  // threads a page and a line apart
  streams.resize(threads);
  streaming.assign(threads, -1);
}

// c = what is there before the main product: nothing, or what `out` holds; and the low-rank tail, masked on its own.
void Product::start(int64_t tile, int64_t panel, float* c) const {
  const int rows = static_cast<int>(tiles.size(tile));
  const int64_t row = tiles.start(tile), col = panel * k.panel();
  tail->multiply(tail_left + tile * tail->r * k.lanes, rows, panel, c);
  if (tail_mask.words) k.mask_tile(c, rows, Mask{tail_mask.words + row * tail_mask.row_stride, tail_mask.row_stride, col});
  if (!left) k.load_tile(from(out, row, col), rows, static_cast<int>(std::min<int64_t>(C - col, k.panel())), c);
}

void Product::finish(int64_t tile, int64_t panel, float* c) const {
  const int64_t row = tiles.start(tile), col = panel * k.panel();
  const Matrix b = bias.data ? from(bias, 0, col) : Matrix{};
  k.store_tile(c, static_cast<int>(tiles.size(tile)), static_cast<int>(std::min<int64_t>(C - col, k.panel())), b, from(out, row, col));
}

void Product::run(int64_t task, int64_t next, int thread) {
  const Parts row_split(tiles.count, ceil_div(tiles.count, row_parts));
  const int64_t part = task % row_parts;
  if (part >= row_split.count) return;
  const int64_t tile0 = row_split.start(part), tile1 = tile0 + row_split.size(part);
  const int64_t p0 = first_panel(task), p1 = last_panel(task);
  float* results = scratch + thread * scratch_size;
  if (!left || R == 0) {
    for (int64_t t = tile0; t < tile1; ++t)
      for (int64_t p = p0; p < p1; ++p) start(t, p, results), finish(t, p, results);
    return;
  }
  const Steps steps(k, arithmetic, R);
  const bool one_block = k_block >= R;
  float* packed = scratch + (thread + 1) * scratch_size - 2 * packed_size - 16;
  PanelStream& stream = streams[thread];
  for (int64_t k0 = 0; k0 < R; k0 += k_block) {
    const int64_t count = std::min(k_block, R - k0), first = k0 / arithmetic.k_per_step;
    const Steps block_steps(k, arithmetic, count);
    const float* block = nullptr;
    if (!panels) {
      if (k0 == 0 && streaming[thread] != task) stream.start(k, arithmetic, right, C, p0, p1, 0, count, packed, 1);
      block = stream.all();
      float* other = block == packed ? packed + packed_size : packed;
      const int64_t calls = (tile1 - tile0) * (p1 - p0) * ceil_div(block_steps.count, kFlushSteps), k1 = k0 + count;
      if (k1 < R) {
        stream.start(k, arithmetic, right, C, p0, p1, k1, std::min(k_block, R - k1), other, calls);
      } else if (next < tasks()) {
        stream.start(k, arithmetic, right, C, first_panel(next), last_panel(next), 0, std::min(k_block, R), other, calls);
        streaming[thread] = next;
      }
    }
    for (int64_t t = tile0; t < tile1; ++t) {
      const float* tile_left = left + t * steps.vector + first * k.lanes;
      for (int64_t p = p0; p < p1; ++p) {
        float* c = one_block ? results : results + ((t - tile0) * group + p - p0) * result_size();
        const float* panel = panels ? panels + p * 2 * steps.vector + first * k.lanes : block + (p - p0) * 2 * block_steps.vector;
        const int64_t vector_stride = panels ? steps.vector : block_steps.vector;
        if (k0 == 0) start(t, p, c);
        for (int64_t s = 0; s < block_steps.count; s += kFlushSteps) {
          stream.some();
          arithmetic.tile(static_cast<int>(tiles.size(t)), 2, tile_left + s * k.lanes, panel + s * k.lanes, vector_stride,
                          std::min(kFlushSteps, block_steps.count - s), c, true);
        }
        if (k0 + count == R) finish(t, p, c);
      }
    }
  }
}

}  // namespace lora_ops
