// Rows with an adapter each in one product: what the low-rank tail of a tile is where its rows differ in it.
//
// Rows stay where they are. Those of a tile that share an adapter are a run; its left operand meets the piece of B (forward) or
// A (backward) of one panel's columns, which is packed into L1 for the moment: r steps beside the R steps of the base product.
// A run of one row multiplies B's rows where they lie, all that a group of panels needs at once: packing them took longer. The
// down-projection reads A and B where they lie. Nothing is packed per adapter, so a batch may have as many as it has rows; what
// it costs is then the reading of them.
#pragma once

#include <vector>

#include "gemm.h"

namespace lora_ops {

// Which factor is the tail's right operand: Bᵀ (r, N) forward, A (r, K) backward.
enum class Side { up_B, up_A };

class MixedRows {
  struct Run;

 public:
  // Of a block's tiles; the block begins at row `row0`.
  MixedRows(const Kernels& k, const MixedBatch& batch, Side side, int64_t most_r, int64_t C, int64_t row0, const Parts& tiles);

  // c = tails of a tile in panels [p0, p1), `stride` floats apart; zero for rows without an adapter. tail_left: rows · most_r ·
  // lanes floats.
  void multiply(int64_t tile, const float* tail_left, int rows, int64_t p0, int64_t p1, float* c, int64_t stride) const;

  // What `multiply` of those panels will read of adapters with one row. `fetch` has the tiles that are computed before bring it
  // near, two pieces a call: so it is read while the arithmetic is busy.
  struct Pieces {
    const Run *run = nullptr, *end = nullptr;
    int64_t col = 0, cols = 0;
  };
  Pieces pieces(int64_t tile, int64_t p0, int64_t p1) const;
  void fetch(Pieces& pieces, int64_t steps, Ahead& ahead) const;

  // S of a tile's rows: stored, and times scaling as the tail's left operand. `own`: forward_size floats.
  void down(int64_t tile, const LoraForward& p, float* own, float* tail_left) const;
  static int64_t forward_size(const Kernels& k, const LoraForward& p);

  // dS (M, most_r) of a tile's rows and the tail's left operand. `own`: backward_size floats.
  void down(int64_t tile, const LoraBackward& p, float* own, float* tail_left, float* dS) const;
  static int64_t backward_size(const Kernels& k, const LoraBackward& p);

 private:
  struct Run {
    const Adapter* adapter;
    int rows;
    int at[kDotRows];  // in the tile
    int64_t left;      // of its left operand [r][lanes] in tail_left
  };

  // Whether a run's results are dot products of B's rows with its one row of S, which then lies in order.
  bool alone(const Run& run) const { return side_ == Side::up_B && run.rows == 1; }
  const Run* next_alone(const Run* run, const Run* end) const;
  void multiply_packed(int64_t tile, const float* tail_left, int64_t panel, float* c) const;

  const Kernels& k_;
  const Side side_;
  const int64_t most_r_, C_, row0_;
  const int64_t* const ids_;  // of the block's rows
  const Parts tiles_;
  std::vector<Run> runs_;
  std::vector<int64_t> first_;  // run of each tile
};

// dA and dB of the adapters of a mixed batch, from dS and S (M, most_r): each is summed over its rows by one task at a time.
void mixed_gradients(const Kernels& k, const LoraBackward& p, const float* dS, const uint32_t* bits, int64_t words, int threads,
                     Workspace& workspace);

}  // namespace lora_ops
