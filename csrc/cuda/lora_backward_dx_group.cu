// dx = Σ_i dy_i W_i + drop'((dS ∘ gate) A)      for layers i that share x; dS (M, Σ r), A (Σ r, K) are those of all layers
//
// gemm.cuh's kernel, whose main loop runs over the depths of all layers, one after the other: a layer's last step is padded
// with zeros, and copies go on with the next layer's operands without a pause. dx is rounded once, where separate launches and
// their sum round and move it once per layer.
#include "lora_gemm.cuh"

namespace lora_ops {
namespace {

struct Product {
  const uint16_t *in, *weight;
  int64_t in_stride, weight_stride;
  int depth;  // 1 or more
};

// The Gemm is all but the dense products, and has no `in`, `weight` and `depth`.
struct GemmSum : GemmDx {
  int count;
  Product products[kMaxGroup];
};

// Both operands' copies, since they go on to the next product in the same step.
template <class TileT, class InCopies, class WeightCopies>
struct SumCopies {
  const GemmSum& p;
  const int row0, column0;
  int next, left;  // product; steps of the present one
  InCopies in;
  WeightCopies weight;

  __device__ SumCopies(const GemmSum& p_, int row0_, int column0_)
      : p(p_), row0(row0_), column0(column0_), next(1), left(steps(0)), in(in_of(0)), weight(weight_of(0)) {}
  __device__ void start(uint32_t stage) {
    if (left == 0 && next < p.count) {
      in = in_of(next);
      weight = weight_of(next);
      left = steps(next++);
    }
    in.start(stage);
    weight.start(stage + TileT::kInBytes);
    --left;
  }
  __device__ int steps(int i) const { return steps_of(p.products[i].depth, TileT::kDepth); }

 private:
  __device__ InCopies in_of(int i) const { return {p.products[i].in, p.products[i].in_stride, row0, p.M, p.products[i].depth}; }
  __device__ WeightCopies weight_of(int i) const {
    return {p.products[i].weight, p.products[i].weight_stride, column0, p.columns, p.products[i].depth};
  }
};

struct NoCopies {
  __device__ void start(uint32_t) const {}
};

template <class T, class TileT, bool kWeightRows, bool kVector>
__global__ void __launch_bounds__(kGemmThreads, 2) gemm_sum_kernel(const __grid_constant__ GemmSum p) {
  using InCopies = RowCopies<TileT::kRows, TileT::kDepth, kVector>;
  using WeightCopies = std::conditional_t<kWeightRows, RowCopies<TileT::kColumns, TileT::kDepth, kVector>,
                                          ColumnCopies<TileT::kColumns, TileT::kDepth, kVector>>;
  const int2 tile = tile_of_block(p.tiles_m, p.tiles_n);
  const int row0 = tile.x * TileT::kRows, column0 = tile.y * TileT::kColumns;
  const SumCopies<TileT, InCopies, WeightCopies> copies(p, row0, column0);
  int steps = 0;
  for (int i = 0; i < p.count; ++i) steps += copies.steps(i);
  gemm<T, TileT, WeightFragments<TileT, kWeightRows>, true>(p, false, row0, column0, steps, copies, NoCopies{});
}

struct GemmSumKernel {
  template <class T, class TileT, bool kWeightRows, bool kVector>
  static auto instance() {
    return gemm_sum_kernel<T, TileT, kWeightRows, kVector>;
  }
};

}  // namespace

void launch_lora_backward_dx_group(const CudaLoraBackwardDx* ops, int count, void* stream) {
  const char* name = "lora_backward_dx_group";
  require(count >= 1 && count <= kMaxGroup, name, "takes one to four layers", shape("count", count));
  if (count == 1) return launch_lora_backward_dx(ops[0], stream);
  const DenseGemm first = gemm_of(name, ops[0]);
  GemmSum sum{{first.gemm}, count, {}};
  bool vector = true;
  for (int i = 0; i < count; ++i) {
    CudaLoraBackwardDx layer = ops[0];
    layer.N = ops[i].N, layer.dy = ops[i].dy, layer.weight = ops[i].weight;
    const DenseGemm op = gemm_of(name, layer);
    const Gemm& p = op.gemm;
    require(!p.accumulate && p.depth > 0 && op.weight_rows == first.weight_rows, name,
            "every layer has a weight, all of one layout", op.shapes);
    sum.products[i] = {p.in, p.weight, p.in_stride, p.weight_stride, p.depth};
    vector = vector && vectors(p);
  }
  launch_gemm<GemmSumKernel>(first, sum, first.gemm.columns, vector, stream);
}

}  // namespace lora_ops

int lora_ops_lora_backward_dx_group(const lora_ops::CudaLoraBackwardDx* params, int count, void* stream) {
  return lora_ops::report_errors([&] { lora_ops::launch_lora_backward_dx_group(params, count, stream); });
}
