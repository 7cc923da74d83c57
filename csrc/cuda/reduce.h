// The end of a split reduction: out = sum over splits of partials, in ascending order, rounded once.
#pragma once

#include <cstdint>

#include "../params.h"

namespace lora_ops {

struct Reduction {
  const float* partials = nullptr;  // (splits, size)
  int64_t splits = 0;
  int64_t size = 0;     // 0: nothing to do
  void* out = nullptr;  // (size)
  DType dtype = DType::f32;
  int64_t columns = 0;     // of out, where
  int64_t row_stride = 0;  // its rows are that many elements apart. 0: contiguous
};

constexpr int kMaxReductions = 3;

struct Reductions {
  Reduction item[kMaxReductions];
};

// One launch for all of them.
void launch_reduce(const Reductions& reductions, void* stream);

}  // namespace lora_ops
