// S (M, r) = drop(x) Aᵀ          lora_down.cuh's block for every tile of rows
#include "lora_down.cuh"

namespace lora_ops {
namespace {

template <typename T, typename Adapter, int kRanks, bool kVector>
__global__ void __launch_bounds__(kThreads, 3) lora_down_kernel(const LoraDownArgs args) {
  lora_down_rows<T, Adapter, kRanks, kVector>(args, int64_t{blockIdx.x} * kTileRows, args.M, args.lora_A, args.r,
                                              tiles_of_block(args.split));
}

struct LoraDownKernel {
  template <typename T, typename Adapter, int kRanks, bool kVector>
  static auto instance() {
    return lora_down_kernel<T, Adapter, kRanks, kVector>;
  }
};

}  // namespace

int64_t workspace_bytes(const LoraDown& op) {
  const Split split = split_of(op, ceil_div(op.M, kTileRows));
  return split.count == 1 ? 0 : split.count * op.M * op.r * static_cast<int64_t>(sizeof(float));
}

void launch_lora_down(const LoraDown& op, void* stream) {
  if (op.M == 0) return;
  const int64_t row_blocks = ceil_div(op.M, kTileRows);
  LoraDownArgs args{op, split_of(op, row_blocks), nullptr};
  args.sums = args.split.count == 1 ? op.S : op.workspace;
  const bool vector = vectors(op.x, op.x_row_stride, op.x_dtype) && vectors(op.lora_A, op.K, op.adapter_dtype);
  launch_rows<LoraDownKernel>("lora_down", args, row_blocks, vector, stream);
}

}  // namespace lora_ops

extern "C" int64_t lora_ops_lora_down_workspace_bytes(const lora_ops::LoraDown* params) {
  return lora_ops::workspace_bytes(*params);
}

extern "C" int lora_ops_lora_down(const lora_ops::LoraDown* params, void* stream) {
  return lora_ops::report_errors([&] { lora_ops::launch_lora_down(*params, stream); });
}
