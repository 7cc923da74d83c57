// out[i] = partials[0][i] + partials[1][i] + ...        one thread per element: neighbours read neighbours, split after split
//
// grid.y picks the reduction, so that the three of lora_backward_up are one launch.
#include <algorithm>

#include "check.h"
#include "reduce.h"
#include "skinny.h"
#include "tile.cuh"

namespace lora_ops {
namespace {

constexpr int kReduceThreads = 256;

__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(const Reductions reductions) {
  static_assert(kMaxReductions == 3, "each named: an index known at run time would copy them to local memory");
  const Reduction reduction = blockIdx.y == 0 ? reductions.item[0] : blockIdx.y == 1 ? reductions.item[1] : reductions.item[2];
  const uint32_t i = blockIdx.x * kReduceThreads + threadIdx.x, columns = reduction.columns;
  if (i >= reduction.size) return;
  float sum = 0.f;
  for (int64_t split = 0; split < reduction.splits; ++split) sum += reduction.partials[split * reduction.size + i];
  const int64_t to = reduction.row_stride == 0 ? i : i / columns * reduction.row_stride + i % columns;
  switch (reduction.dtype) {
    case DType::f32:
      static_cast<float*>(reduction.out)[to] = sum;
      break;
    case DType::bf16:
      static_cast<Bf16*>(reduction.out)[to] = from_float<Bf16>(sum);
      break;
    case DType::f16:
      static_cast<Half*>(reduction.out)[to] = from_float<Half>(sum);
      break;
  }
}

}  // namespace

void launch_reduce(const Reductions& reductions, void* stream) {
  int64_t largest = 0;
  for (const Reduction& reduction : reductions.item) largest = std::max(largest, reduction.size);
  if (largest == 0) return;
  require(largest <= UINT32_MAX, "reduce", "too many sums", shapes("size", largest));
  const dim3 grid(static_cast<unsigned>(ceil_div(largest, kReduceThreads)), kMaxReductions);
  launch("reduce", reduce_kernel, grid, kReduceThreads, 0, stream, reductions, shapes("size", largest));
}

}  // namespace lora_ops
