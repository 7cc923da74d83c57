// What the skinny products share on the host: how a reduction is split.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace lora_ops {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// `steps` of a reduction, `each` of them per block of the grid (the last has what is left), over `count` blocks.
struct Split {
  int64_t steps, each, count;
};

// Two blocks per SM are wanted; `blocks` are there without a split. A function of its arguments alone: so is the order of
// summation.
inline Split split_reduction(int64_t steps, int64_t blocks, int sm_count) {
  const int64_t wanted = std::min<int64_t>(2 * int64_t{sm_count} / std::max<int64_t>(blocks, 1), 256);
  const int64_t each = std::max<int64_t>(1, ceil_div(steps, std::max<int64_t>(wanted, 1)));
  return {steps, each, std::max<int64_t>(1, ceil_div(steps, each))};
}

}  // namespace lora_ops
