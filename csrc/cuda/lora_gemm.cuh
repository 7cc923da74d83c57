// The products that lora_forward and lora_backward_dx are, in all of their forms. Host code.
#pragma once

#include "gemm_launch.cuh"
#include "lora_backward_dx.h"
#include "lora_forward.h"

namespace lora_ops {

inline DenseGemm gemm_of(const char* name, const CudaLoraForward& p) {
  const std::string sizes = shapes("M", p.M, "columns", p.N, "depth", p.K, "r", p.r);
  const Gemm gemm = describe(name, p.M, p.N, p.K, p.r, p.x, p.S, p.lora_B, p.scaling, p.bias, {}, p.y, sizes);
  DenseGemm op{name, sizes, gemm, p.y.dtype, true, p.tile};
  set_weight(op, p.weight);
  set_left(op.gemm, p.S_row_stride, p.gate, p.gate_row_stride);
  op.gemm.out_scale = p.m.data;
  op.gemm.out_scale_f32 = p.m.dtype == DType::f32;
  return op;
}

inline DenseGemm gemm_of(const char* name, const CudaLoraBackwardDx& p) {
  const std::string sizes = shapes("M", p.M, "columns", p.K, "depth", p.N, "r", p.r);
  const float keep_scale = p.dropout.threshold > 0 ? p.dropout.keep_scale : 1.f;
  const Gemm gemm = describe(name, p.M, p.K, p.N, p.r, p.dy, p.dS, transpose(p.lora_A), keep_scale, {}, p.dropout, p.dx, sizes);
  DenseGemm op{name, sizes, gemm, p.dx.dtype, true, p.tile};
  set_weight(op, transpose(p.weight));
  set_left(op.gemm, p.dS_row_stride, p.gate, p.gate_row_stride);
  return op;
}

}  // namespace lora_ops
