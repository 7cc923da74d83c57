#include "mixed.h"

#include <cstring>

#include "../nf4.h"

namespace lora_ops {
namespace {

constexpr int64_t kUpSteps = 64;     // of a piece of A or B packed at a time
constexpr int64_t kDotBlock = 1024;  // of the reduction: kDotRows rows of x stay in L1
constexpr int64_t kDownSteps = 512;  // rows of B packed at a time

int64_t whole_rows(int64_t K) {
  return ceil_div(K, kChunk) * kChunk;
}

}  // namespace

MixedRows::MixedRows(const Kernels& k, const MixedBatch& batch, Side side, int64_t most_r, int64_t C, int64_t row0,
                     const Parts& tiles)
    : k_(k), side_(side), most_r_(most_r), C_(C), row0_(row0), ids_(batch.ids + row0), tiles_(tiles) {
  const int most = std::min(kDotRows, k.f32.rows);
  int64_t grouped = 0;
  for (int64_t t = 0; t < tiles.count; ++t) {
    first_.push_back(static_cast<int64_t>(runs_.size()));
    const int64_t* ids = ids_ + tiles.start(t);
    const int rows = static_cast<int>(tiles.size(t));
    for (int i = 0; i < rows; ++i) {
      if (ids[i] < 0 || std::find(ids, ids + i, ids[i]) != ids + i) continue;  // with an earlier row's
      for (int j = i; j < rows; ++j) {
        if (ids[j] != ids[i]) continue;
        const bool begins = j == i || runs_.back().rows == most;
        if (begins) runs_.push_back({batch.adapters + ids[i], 0, {}, grouped * most_r * k.lanes});
        runs_.back().at[runs_.back().rows++] = j;
        ++grouped;
      }
    }
  }
  first_.push_back(static_cast<int64_t>(runs_.size()));
}

const MixedRows::Run* MixedRows::next_alone(const Run* run, const Run* end) const {
  return std::find_if(run, end, [&](const Run& r) { return alone(r); });
}

void MixedRows::multiply(int64_t tile, const float* tail_left, int rows, int64_t p0, int64_t p1, float* c,
                         int64_t stride) const {
  const int panel = k_.panel();
  for (int i = 0; i < rows; ++i) {
    if (ids_[tiles_.start(tile) + i] >= 0) continue;
    for (int64_t p = p0; p < p1; ++p) std::fill_n(c + (p - p0) * stride + i * panel, panel, 0.f);
  }
  const Run* const end = runs_.data() + first_[tile + 1];
  for (const Run* run = next_alone(runs_.data() + first_[tile], end); run < end;) {
    const Run* const next = next_alone(run + 1, end);
    const Matrix& B = run->adapter->lora_B;
    const int64_t ahead = next < end ? next->adapter->lora_B.at(p0 * panel, 0) - B.at(p0 * panel, 0) : 0;
    for (int64_t p = p0; p < p1; ++p) {
      const int cols = static_cast<int>(std::min<int64_t>(panel, C_ - p * panel));
      float* to = c + (p - p0) * stride + run->at[0] * panel;
      k_.dot_short(tail_left + run->left, from(B, p * panel, 0), cols, run->adapter->r, to, ahead);
    }
    run = next;
  }
  for (int64_t p = p0; p < p1; ++p) multiply_packed(tile, tail_left, p, c + (p - p0) * stride);
}

MixedRows::Pieces MixedRows::pieces(int64_t tile, int64_t p0, int64_t p1) const {
  const Run *first = runs_.data() + first_[tile], *end = runs_.data() + first_[tile + 1];
  return {next_alone(first, end), end, p0 * k_.panel(), std::min(p1 * k_.panel(), C_) - p0 * k_.panel()};
}

void MixedRows::fetch(Pieces& pieces, int64_t steps, Ahead& ahead) const {
  ahead.pieces[0] = ahead.pieces[1] = nullptr;
  if (pieces.run == pieces.end) return;
  const Run* const other = next_alone(pieces.run + 1, pieces.end);
  const Matrix& B = pieces.run->adapter->lora_B;
  ahead.pieces[0] = ahead.pieces[1] = B.at(pieces.col, 0);
  if (other < pieces.end) ahead.pieces[1] = other->adapter->lora_B.at(pieces.col, 0);
  ahead.pieces_step = ceil_div(2 * pieces.cols * B.row_stride * size_of(B.dtype), steps);
  pieces.run = other < pieces.end ? next_alone(other + 1, pieces.end) : pieces.end;
}

// Runs of several rows, in one panel.
void MixedRows::multiply_packed(int64_t tile, const float* tail_left, int64_t p, float* c) const {
  const int panel = k_.panel();
  alignas(64) float packed[kUpSteps * 2 * kMaxLanes], products[kDotRows * 2 * kMaxLanes];
  const Adapter* holds = nullptr;  // whose piece `packed` is
  for (int64_t n = first_[tile]; n < first_[tile + 1]; ++n) {
    const Run& run = runs_[n];
    if (alone(run)) continue;
    const Adapter& a = *run.adapter;
    const bool in_order = run.at[run.rows - 1] - run.at[0] == run.rows - 1;
    float* to = in_order ? c + run.at[0] * panel : products;
    for (int64_t s = 0; s < a.r; s += kUpSteps) {
      const int64_t steps = std::min(kUpSteps, a.r - s);
      if (holds != &a) {
        const Matrix right = side_ == Side::up_B ? transposed(a.lora_B) : a.lora_A;
        pack_right(k_, k_.f32, right, C_, p * panel, 2, s, steps, Mask{}, packed, steps * k_.lanes);
      }
      k_.f32.tile(run.rows, 2, tail_left + run.left + s * k_.lanes, packed, steps * k_.lanes, steps, to, s > 0, kNothingAhead);
    }
    holds = a.r <= kUpSteps ? &a : nullptr;
    if (in_order) continue;
    for (int i = 0; i < run.rows; ++i) std::memcpy(c + run.at[i] * panel, products + i * panel, panel * sizeof(float));
  }
}

int64_t MixedRows::forward_size(const Kernels& k, const LoraForward& p) {
  const int64_t sums = ceil_div(p.r, k.panel()) * kDotRows * k.panel();
  return kDotRows * whole_rows(p.K) + sums + (p.dropout.threshold ? mask_words(p.K) : 0);
}

void MixedRows::down(int64_t tile, const LoraForward& p, float* own, float* tail_left) const {
  const int64_t stride = whole_rows(p.K), first = row0_ + tiles_.start(tile);
  const int panel = k_.panel();
  const bool pairs = k_.pairs.dot && p.x.dtype == DType::bf16 && !p.dropout.threshold;  // of those whose A is in bf16
  float* sums = own + kDotRows * stride;
  uint32_t* bits = reinterpret_cast<uint32_t*>(sums + ceil_div(p.r, panel) * kDotRows * panel);
  for (int i = 0; i < tiles_.size(tile); ++i) std::fill_n(p.S + (first + i) * p.r, p.r, 0.f);
  for (int64_t n = first_[tile]; n < first_[tile + 1]; ++n) {
    const Run& run = runs_[n];
    const Adapter& a = *run.adapter;
    const bool in_pairs = pairs && a.lora_A.dtype == DType::bf16;
    const char* next = n + 1 < first_[tile + 1] ? runs_[n + 1].adapter->lora_A.at(0, 0) : nullptr;
    for (int i = 0; i < run.rows; ++i) {
      Mask mask;
      if (p.dropout.threshold) {
        k_.dropout_mask(p.dropout, first + run.at[i], p.K, bits);
        mask = Mask{bits, 0};
      }
      const Matrix x = from(p.x, first + run.at[i], 0);
      in_pairs ? k_.pairs.order(x, p.K, mask, own + i * stride) : k_.dot_order(x, p.K, mask, a.lora_A.dtype, own + i * stride);
    }
    std::fill_n(sums, ceil_div(a.r, panel) * kDotRows * panel, 0.f);
    const int64_t k_block = run.rows == 1 ? p.K : kDotBlock;
    for (int64_t k0 = 0; k0 < p.K; k0 += k_block)
      for (int64_t j = 0; j < a.r; j += panel) {
        const int cols = static_cast<int>(std::min<int64_t>(a.r - j, panel));
        const int64_t count = std::min(k_block, p.K - k0);
        const Matrix A = from(a.lora_A, j, k0);
        if (in_pairs) {
          k_.pairs.dot(run.rows, own + k0 / 2, stride, A, cols, count, sums + j * kDotRows, j + panel < a.r ? nullptr : next);
        } else {
          k_.dot(run.rows, own + k0, stride, A, cols, count, sums + j * kDotRows);
        }
      }
    float* left = tail_left + run.left;
    const int lanes = alone(run) ? 1 : k_.lanes;
    std::fill_n(left, a.r * k_.lanes, 0.f);
    for (int i = 0; i < run.rows; ++i)
      for (int64_t j = 0; j < a.r; ++j) {
        const float s = sums[j / panel * kDotRows * panel + i * panel + j % panel] * p.dropout.keep_scale;
        p.S[(first + run.at[i]) * p.r + j] = s;
        left[j * lanes + i] = a.scaling * s;
      }
  }
}

// own: [lanes][kDownSteps] gathered dy, [kDownSteps][lanes] of it packed, [r / lanes][kDownSteps][lanes] of B, and the sums.
int64_t MixedRows::backward_size(const Kernels& k, const LoraBackward& p) {
  const int64_t vectors = 2 * ceil_div(p.r, k.panel());
  return (2 + vectors) * kDownSteps * k.lanes + vectors / 2 * kDotRows * k.panel();
}

void MixedRows::down(int64_t tile, const LoraBackward& p, float* own, float* tail_left, float* dS) const {
  const int64_t first = row0_ + tiles_.start(tile);
  const int panel = k_.panel(), lanes = k_.lanes;
  float *left = own + kDownSteps * lanes, *right = left + kDownSteps * lanes;
  float* sums = right + 2 * ceil_div(p.r, panel) * kDownSteps * lanes;
  const Matrix gathered{own, kDownSteps, 1, p.dy.dtype};
  for (int64_t n = first_[tile]; n < first_[tile + 1]; ++n) {
    const Run& run = runs_[n];
    const Adapter& a = *run.adapter;
    for (int64_t n0 = 0; n0 < p.N; n0 += kDownSteps) {
      const int64_t steps = std::min(kDownSteps, p.N - n0);
      for (int i = 0; i < lanes; ++i)  // whole vectors pack fastest: lanes beyond the run's rows are never used
        std::memcpy(gathered.at(i, 0), p.dy.at(first + run.at[std::min(i, run.rows - 1)], n0), steps * size_of(p.dy.dtype));
      k_.f32.pack_left(gathered, lanes, steps, left);
      pack_right(k_, k_.f32, from(a.lora_B, n0, 0), a.r, 0, static_cast<int>(2 * ceil_div(a.r, panel)), 0, steps, Mask{}, right,
                 steps * lanes);
      for (int64_t j = 0; j < a.r; j += panel)
        k_.f32.tile(run.rows, a.r - j > lanes ? 2 : 1, left, right + j * steps, steps * lanes, steps, sums + j * kDotRows,
                    n0 > 0, kNothingAhead);
    }
    const float scale = a.scaling * p.dropout.keep_scale;
    float* tail = tail_left + run.left;
    std::fill_n(tail, a.r * lanes, 0.f);
    for (int i = 0; i < run.rows; ++i)
      for (int64_t j = 0; j < a.r; ++j) {
        const float v = scale * sums[j / panel * kDotRows * panel + i * panel + j % panel];
        dS[(first + run.at[i]) * p.r + j] = v;
        tail[j * lanes + i] = v;
      }
  }
}

namespace {

constexpr int64_t kColumns = 8;     // panels of a task: neighbours in memory, read together
constexpr int64_t kRowBlock = 256;  // rows of a panel packed at a time

// out (r, C), or its transpose = scale · leftᵀ · right over some rows: left (M, left_stride) in fp32, right (M, C).
struct RowSum {
  const std::vector<int64_t>* rows;
  const float* left;
  Matrix right;
  Mask mask;  // of right
  int64_t r, C;
  float scale;
  bool transpose;
  Matrix out;

  int64_t tasks(const Kernels& k) const { return ceil_div(ceil_div(C, k.panel()), kColumns); }
};

int64_t row_sum_size(const Kernels& k, int64_t r) {
  return kRowBlock * kColumns * k.panel() + kRowBlock * k.lanes * ceil_div(r, k.f32.rows) + kColumns * r * k.panel();
}

// Columns of one task. own: row_sum_size floats.
void run_row_sum(const Kernels& k, const RowSum& s, int64_t left_stride, int64_t task, float* own) {
  const int64_t col = task * kColumns * k.panel(), count = std::min(kColumns * k.panel(), s.C - col);
  const int64_t panels = ceil_div(count, k.panel()), M = static_cast<int64_t>(s.rows->size());
  const int vectors = static_cast<int>(2 * panels);
  const Parts tiles(s.r, k.f32.rows);
  float *right = own, *left = right + kRowBlock * kColumns * k.panel(), *sums = left + kRowBlock * k.lanes * tiles.count;
  for (int64_t m0 = 0; m0 < M; m0 += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, M - m0);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t row = (*s.rows)[m0 + m];
      const Mask mask{s.mask.words ? s.mask.words + row * s.mask.row_stride : nullptr, 0, col};
      k.f32.pack_straight(from(s.right, row, col), count, 1, mask, right + m * k.lanes, vectors, rows * k.lanes);
      for (int64_t t = 0; t < tiles.count; ++t)
        for (int64_t j = 0; j < tiles.size(t); ++j)
          left[(t * rows + m) * k.lanes + j] = s.left[row * left_stride + tiles.start(t) + j];
    }
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t t = 0; t < tiles.count; ++t)
        k.f32.tile(static_cast<int>(tiles.size(t)), 2, left + t * rows * k.lanes, right + p * rows * k.panel(), rows * k.lanes,
                   rows, sums + (p * s.r + tiles.start(t)) * k.panel(), m0 > 0, kNothingAhead);
  }
  for (int64_t p = 0; p < panels; ++p) {
    const int cols = static_cast<int>(std::min<int64_t>(count - p * k.panel(), k.panel()));
    const float* sum = sums + p * s.r * k.panel();
    if (s.transpose) {
      store_transposed(k, sum, s.r, cols, s.scale, from(s.out, col + p * k.panel(), 0));
    } else {
      k.store_tile(sum, static_cast<int>(s.r), cols, Matrix{}, from(s.out, 0, col + p * k.panel()));
    }
  }
}

}  // namespace

void mixed_gradients(const Kernels& k, const LoraBackward& p, const float* dS, const uint32_t* bits, int64_t words, int threads,
                     Workspace& workspace) {
  std::vector<std::vector<int64_t>> rows(p.mixed.count);
  for (int64_t i = 0; i < p.M; ++i)
    if (p.mixed.ids[i] >= 0) rows[p.mixed.ids[i]].push_back(i);
  std::vector<RowSum> sums;
  std::vector<int64_t> first{0};  // task of each sum
  const auto add = [&](const RowSum& sum) {
    if (!sum.out.data) return;
    sums.push_back(sum);
    first.push_back(first.back() + sum.tasks(k));
  };
  for (int64_t i = 0; i < p.mixed.count; ++i) {
    const Adapter& a = p.mixed.adapters[i];
    if (rows[i].empty()) continue;
    add({&rows[i], dS, p.x, words ? Mask{bits, words} : Mask{}, a.r, p.K, 1.f, false, a.dA});
    add({&rows[i], p.S, p.dy, Mask{}, a.r, p.N, a.scaling, true, a.dB});
  }
  const int64_t own_size = row_sum_size(k, p.r);
  float* own = workspace.floats(own_size * threads);
  Tasks tasks(first.back());
  parallel(threads, [&](int thread) {
    tasks.run([&](int64_t t) {
      const int64_t i = std::upper_bound(first.begin(), first.end(), t) - first.begin() - 1;
      run_row_sum(k, sums[i], p.r, t - first[i], own + thread * own_size);
    });
  });
}

}  // namespace lora_ops
