// What a kernel is told: addresses, shapes, strides, element types. Nothing of torch, nothing of Python.
//
// Shapes are PyTorch's, row-major: x (M, K), weight (N, K), lora_A (r, K), lora_B (N, r), bias (N).
#pragma once

#include <cstdint>

namespace lora_ops {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

constexpr int64_t size_of(DType t) {
  return t == DType::f32 ? 4 : 2;
}

// A matrix in memory. Strides are in elements; one of the two is 1, except where `data` is null (matrix absent).
struct Matrix {
  void* data = nullptr;
  int64_t row_stride = 0;
  int64_t col_stride = 1;
  DType dtype = DType::f32;

  char* at(int64_t row, int64_t col) const {
    return static_cast<char*>(data) + (row * row_stride + col * col_stride) * size_of(dtype);
  }
};

// A weight (N, K) in 4 bits, as nf4.h lays it out: weight[n][k] = values[code] * absmax[(n * K + k) / blocksize].
struct QuantizedWeight {
  int64_t K = 0;
  const uint8_t* codes = nullptr;  // (N, row_bytes(K)); null: absent
  const float* values = nullptr;   // (16)
  int64_t blocksize = 0;           // a power of two, at least 32
  const void* absmax = nullptr;    // fp32; with double quantisation uint8, see below
  // absmax[b] = nested_code[uint8] * nested_absmax[b / 256] + offset, or nested_code is null
  const float* nested_absmax = nullptr;
  const float* nested_code = nullptr;  // (256)
  float offset = 0.f;
};

// Element (row, col) of x is dropped when its 16 random bits (philox.h) are below `threshold` = round(65536 p).
struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;  // 0: no dropout
  float keep_scale = 1.f;  // 1 / (1 - p)
};

// One adapter of a mixed batch: A and B with contiguous rows; dA and dB like them, or absent.
struct Adapter {
  int64_t r;
  Matrix lora_A;  // (r, K)
  Matrix lora_B;  // (N, r)
  float scaling;
  Matrix dA, dB;
};

// Rows that each have an adapter of their own, or none: instead of one lora_A, lora_B and scaling.
struct MixedBatch {
  const Adapter* adapters = nullptr;
  int64_t count = 0;
  const int64_t* ids = nullptr;  // (M): which of the adapters, or -1; null: the batch is not mixed
};

// What stands between A and B: (S ∘ gate) core. Either may be absent.
struct Middle {
  const float* gate = nullptr;  // (r), or (M, r)
  int64_t gate_row_stride = 0;  // r, or 0: one gate for all rows
  Matrix core = {};             // (r, r)
};

// S = drop(x) Aᵀ ;  z = x W0ᵀ + scaling · S Bᵀ ;  y = out_scale ∘ z + bias, in z with (S ∘ gate) core in S's place
struct LoraForward {
  int64_t M, K, N, r;
  Matrix x;                       // (M, K)
  Matrix weight;                  // (N, K)
  QuantizedWeight quantized;      // the weight in 4 bits, instead. Neither: y already holds x W0ᵀ
  const float* panels = nullptr;  // weight in packed panels (pack_weight), or null
  Matrix lora_A;                  // (r, K)
  Matrix lora_B;                  // (N, r)
  Matrix bias;                    // (1, N) or absent
  float scaling;
  Dropout dropout;
  Matrix y;  // (M, N), x's dtype
  float* S;  // (M, r)
  int threads;
  MixedBatch mixed = {};             // then r is the largest rank: a row of S ends with zeros
  Middle middle = {};                // not beside mixed
  const float* out_scale = nullptr;  // (N), or null: 1
  Matrix z = {};                     // (M, N), x's dtype: what out_scale multiplies, in half precision x W0ᵀ alone; or absent
};

// dz = dy ∘ out_scale ;  dS = scaling · dz B ;  dx = dz W0 + drop'(dS A) ;  dA = dSᵀ drop(x) ;  dB = scaling · dzᵀ S
// dbias = Σ_rows dy ;  dout_scale = Σ_rows dy ∘ z, in half precision with scaling · Σ_r (dyᵀ S) ∘ B
// and with S1 = S ∘ gate, S2 = S1 core: dS2 as dS above, dB and dout_scale of S2, dcore = S1ᵀ dS2, dS1 = dS2 coreᵀ,
// dgate = dS1 ∘ S, dS = dS1 ∘ gate. An absent output is not computed; an input that only absent outputs need may be absent too.
struct LoraBackward {
  int64_t M, K, N, r;
  Matrix dy;                  // (M, N)
  Matrix x;                   // (M, K)
  Matrix weight;              // (N, K)
  QuantizedWeight quantized;  // the weight in 4 bits, instead. Neither: dx already holds dy W0
  Matrix lora_A;              // (r, K)
  Matrix lora_B;              // (N, r)
  const float* S;             // (M, r)
  float scaling;
  Dropout dropout;
  Matrix dx;     // (M, K), dy's dtype
  Matrix dA;     // (r, K)
  Matrix dB;     // (N, r)
  Matrix dbias;  // (1, N)
  int threads;
  MixedBatch mixed = {};             // then r is the largest rank, and dA and dB are the adapters'
  Middle middle = {};                // not beside mixed
  const float* out_scale = nullptr;  // (N), or null: 1
  Matrix z = {};                     // (M, N), dy's dtype
  float* dgate = nullptr;            // as gate
  float* dcore = nullptr;            // (r, r)
  float* dout_scale = nullptr;       // (N)
};

}  // namespace lora_ops
