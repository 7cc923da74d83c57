#include "low_rank.h"

#include <cmath>
#include <cstring>
#include <memory>

namespace lora_ops {
namespace {

constexpr int64_t kDownSteps = 256;  // of a chain of additions, where they are not cut by the tile itself

uint16_t* halves(Workspace& w, int64_t count) {
  return reinterpret_cast<uint16_t*>(w.words(ceil_div(count, 2)));
}

// Rows [first, first + count) of the long side of `factor` (long, r), split and stacked along r into `parts`: slot[p] is where
// part p goes, part 2 nowhere if it is negative. Returns the stack, (long, kParts * r), in the factor's own orientation.
Matrix split_rows(const Arithmetic& low, const Matrix& factor, int64_t length, int64_t r, int64_t first, int64_t count,
                  const int (&slot)[3], uint16_t* parts) {
  const bool along = factor.row_stride == 1 && factor.col_stride != 1;  // the long side is contiguous
  const int64_t lines = along ? r : count, size = along ? count : r;
  std::unique_ptr<uint16_t[]> nowhere(slot[2] < 0 ? new uint16_t[size] : nullptr);
  for (int64_t i = 0; i < lines; ++i) {
    uint16_t* out[3];
    for (int p = 0; p < 3; ++p) {
      const int64_t at = along ? (slot[p] * r + i) * length + first : (first + i) * kParts * r + slot[p] * r;
      out[p] = slot[p] < 0 ? nowhere.get() : parts + at;
    }
    low.split(Matrix{along ? factor.at(first, i) : factor.at(first + i, 0), 0, 1, factor.dtype}, size, out);
  }
  return along ? Matrix{parts, 1, length, DType::bf16} : Matrix{parts, kParts * r, 1, DType::bf16};
}

}  // namespace

DownPanels::DownPanels(const Kernels& k_, const Arithmetic& low_, int64_t R_, int64_t r_, Workspace& w)
    : k(k_),
      low(low_),
      R(R_),
      r(r_),
      cols(low_.split ? kParts * r_ : r_),
      steps(k_, low_, R_),
      data(w.floats(ceil_div(cols, k_.lanes) * steps.vector)),
      parts(halves(w, low_.split ? cols * R_ : 0)) {}

void DownPanels::pack(const Matrix& right, int64_t task) const {
  const int64_t k0 = task * kChunk, count = std::min(kChunk, R - k0);
  const Matrix factor = low.split ? split_rows(low, right, R, r, k0, count, {0, 1, 2}, parts) : right;
  const int vectors = static_cast<int>(ceil_div(cols, k.lanes));
  pack_right(k, low, factor, cols, 0, vectors, k0, count, Mask{}, data + k0 / low.k_per_step * k.lanes, steps.vector);
}

void DownPanels::multiply(const float* left, int rows, float* s) const {
  alignas(64) float c[kMaxTile];
  std::fill_n(s, rows * r, 0.f);
  if (low.begin) low.begin();
  const int64_t left_step = steps.count ? steps.left / steps.count : 0, most = low.split ? kDownSteps : steps.count;
  for (int64_t j0 = 0; j0 < cols; j0 += k.panel())
    for (int64_t first = 0; first < steps.count; first += most) {
      const int64_t count = std::min(most, steps.count - first);
      low.tile(rows, cols - j0 > k.lanes ? 2 : 1, left + first * left_step,
               data + j0 / k.lanes * steps.vector + first * k.lanes, steps.vector, count, c, false, {});
      for (int64_t j = j0; j < std::min(cols, j0 + k.panel()); ++j)
        for (int i = 0; i < rows; ++i) {
          float& sum = s[i * r + j % r];
          if (j < r || std::isfinite(sum)) sum += c[i * k.panel() + j - j0];  // infinity times a lower part of 0 is no news
        }
    }
  if (low.end) low.end();
}

UpPanels::UpPanels(const Kernels& k_, const Arithmetic& low_, int64_t r_, int64_t C_, Workspace& w)
    : k(k_),
      low(low_),
      r(r_),
      C(C_),
      depth(low_.split ? kParts * r_ : r_),
      steps(k_, low_, depth),
      data(w.floats(ceil_div(C_, k_.panel()) * 2 * steps.vector)),
      parts(halves(w, low_.split ? depth * C_ : 0)) {}

void UpPanels::pack(const Matrix& right, int64_t task) const {
  const int64_t p0 = task * kChunk, p1 = std::min(p0 + kChunk, ceil_div(C, k.panel()));
  const int64_t first = p0 * k.panel(), count = std::min(C, p1 * k.panel()) - first;
  Matrix factor = right;
  if (low.split) {
    factor = transposed(split_rows(low, transposed(right), C, r, first, count, {0, 2, -1}, parts));
    for (int64_t i = 0; i < (factor.col_stride == 1 ? r : count); ++i) {  // the high part once more, for the left one's low
      char* high = factor.col_stride == 1 ? factor.at(i, first) : factor.at(0, first + i);
      const int64_t size = factor.col_stride == 1 ? count : r;
      char* again = factor.col_stride == 1 ? factor.at(r + i, first) : factor.at(r, first + i);
      std::memcpy(again, high, size * sizeof(uint16_t));
    }
  }
  pack_right(k, low, factor, C, first, static_cast<int>(2 * (p1 - p0)), 0, depth, Mask{}, data + p0 * 2 * steps.vector,
             steps.vector);
}

int64_t UpPanels::left_size(int rows) const {
  return low.split ? steps.left : ceil_div(rows, k.lanes) * r * k.lanes;
}

// fp32: [vector of rows][r][lanes]. In parts: high, low, high, as a row of the left operand: [32 of the depth][rows][32].
void UpPanels::set_left(float* left, int64_t i, const float* s) const {
  if (!low.split) {
    for (int64_t j = 0; j < r; ++j) left[i / k.lanes * r * k.lanes + j * k.lanes + i % k.lanes] = s[j];
    return;
  }
  constexpr int64_t kMost = 256;  // of s at a time
  uint16_t part[3][kMost];
  uint16_t* to = reinterpret_cast<uint16_t*>(left);
  const auto at = [&](int64_t d) { return d / 32 * 32 * low.rows + i * 32 + d % 32; };
  for (int64_t j0 = 0; j0 < r; j0 += kMost) {
    const int64_t count = std::min(kMost, r - j0);
    uint16_t* const out[3] = {part[0], part[1], part[2]};
    low.split(Matrix{const_cast<float*>(s) + j0, 0, 1, DType::f32}, count, out);
    for (int64_t j = 0; j < count; ++j) {
      to[at(j0 + j)] = part[0][j];
      to[at(2 * r + j0 + j)] = std::isfinite(s[j0 + j]) ? part[0][j] : 0;  // infinity meets the factor's high part alone
      to[at(r + j0 + j)] = part[1][j];
    }
  }
  for (int64_t d = depth; d < steps.count * low.k_per_step; ++d) to[at(d)] = 0;
}

void UpPanels::multiply(const float* left, int rows, int64_t panel, float* c) const {
  const float* right = data + panel * 2 * steps.vector;
  each_low_tile(k, low, rows, [&](int64_t i, int rows_here) {
    const float* rows_left = low.split ? left : left + i / k.lanes * r * k.lanes + i % k.lanes;
    low.tile(rows_here, 2, rows_left, right, steps.vector, steps.count, c + i * k.panel(), false, {});
  });
}

}  // namespace lora_ops
