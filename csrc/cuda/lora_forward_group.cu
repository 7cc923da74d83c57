// y_i = m_i ∘ (x W_iᵀ + scaling_i · (S_i ∘ gate_i) B_iᵀ) + bias_i      for layers i that share x, in one launch
//
// One grid holds the tiles of all layers, as if their columns lay side by side. So blocks that run at about the same time have
// the same rows of x, whichever layer they work for, and x comes from L2; and layers too narrow to fill the GPU on their own,
// such as keys and values of grouped-query attention, fill it together. A block is gemm.cuh's, bit for bit.
#include "lora_gemm.cuh"

namespace lora_ops {
namespace {

struct GemmGroup {
  int tiles_m, tiles_n;       // of all layers
  int first_tile[kMaxGroup];  // of a layer's columns. Layers that do not exist have no columns, behind all others
  Gemm layer[kMaxGroup];
};

template <class T, class TileT, bool kWeightRows, bool kVector>
__global__ void __launch_bounds__(kGemmThreads, 2) gemm_group_kernel(const __grid_constant__ GemmGroup group) {
  const int2 tile = tile_of_block(group.tiles_m, group.tiles_n);
  int layer = 0;
#pragma unroll
  for (int i = 1; i < kMaxGroup; ++i) layer += tile.y >= group.first_tile[i];
  gemm_tile<T, TileT, kWeightRows, kVector, false>(group.layer[layer], false, {tile.x, tile.y - group.first_tile[layer]});
}

struct GemmGroupKernel {
  template <class T, class TileT, bool kWeightRows, bool kVector>
  static auto instance() {
    return gemm_group_kernel<T, TileT, kWeightRows, kVector>;
  }
};

template <class TileT>
dim3 cut(const char* name, GemmGroup& group, const std::string& shapes) {
  int64_t tiles_n = 0;
  for (int i = 0; i < kMaxGroup; ++i) {
    group.first_tile[i] = static_cast<int>(tiles_n);
    tiles_n += tiles_of(group.layer[i].columns, TileT::kColumns);
  }
  return lora_ops::cut(name, group, tiles_of(group.layer[0].M, TileT::kRows), tiles_n, shapes);
}

}  // namespace

void launch_lora_forward_group(const CudaLoraForward* ops, int count, void* stream) {
  const char* name = "lora_forward_group";
  require(count >= 1 && count <= kMaxGroup, name, "takes one to four layers", shape("count", count));
  if (count == 1) return launch_lora_forward(ops[0], stream);
  const DenseGemm first = gemm_of(name, ops[0]);
  GemmGroup group{};
  int64_t columns = 0;
  bool vector = true;
  for (int i = 0; i < count; ++i) {
    const DenseGemm op = gemm_of(name, ops[i]);
    const Gemm& p = op.gemm;
    group.layer[i] = p;
    require(p.in == first.gemm.in && p.in_stride == first.gemm.in_stride && p.M == first.gemm.M && p.depth == first.gemm.depth,
            name, "layers share x", op.shapes);
    require(
        !p.accumulate && op.dtype == first.dtype && op.weight_rows == first.weight_rows && p.right_f32 == first.gemm.right_f32,
        name, "every layer has a weight, all of one layout and all adapters of one dtype", op.shapes);
    columns += p.columns;
    vector = vector && vectors(p);
  }
  launch_gemm<GemmGroupKernel>(first, group, columns, vector, stream);
}

}  // namespace lora_ops

int lora_ops_lora_forward_group(const lora_ops::CudaLoraForward* params, int count, void* stream) {
  return lora_ops::report_errors([&] { lora_ops::launch_lora_forward_group(params, count, stream); });
}
