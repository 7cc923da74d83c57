// Any CPU: four lanes through the compiler's vector extension, 4 x 8 tiles, in double. Where these kernels run the base product
// is torch's (lora_ops/ops.py), and what is left is small: exactness costs little here.
#include <cstring>

#include "../nf4.h"
#include "../philox.h"
#include "convert.h"
#include "kernels.h"

namespace lora_ops {
namespace generic {

struct V {
  using T = double __attribute__((vector_size(32)));
  using F = float __attribute__((vector_size(16)));
  using U = uint32_t;
  static constexpr int kLanes = 4;
  static constexpr int kRows = 4;
  static constexpr int kCounters = 1;
  static constexpr int kShortestChain = 1 << 20;
  static constexpr bool kPairs = false;
  static constexpr FewRows kFewRows = {8, 4, 8};
  static constexpr int kFetchedFrom = 8;

  static T zero() { return T{}; }
  static T load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, T);
  }
  static void store(float* p, T v) {
    const F narrow = __builtin_convertvector(v, F);
    std::memcpy(p, &narrow, sizeof narrow);
  }
  static T broadcast(const float* p) { return T{*p, *p, *p, *p}; }
  static T add(T a, T b) { return a + b; }
  static T mul(T a, T b) { return a * b; }
  static T fma(T a, T b, T c) { return a * b + c; }
  static void pin(T&) {}
  static T keep_bit(T v, const uint32_t* words, int bit) {
    for (int i = 0; i < kLanes; ++i) v[i] = words[i] >> bit & 1u ? v[i] : v[i] * 0.;
    return v;
  }
  static T keep(T v, uint32_t bits) {
    for (int i = 0; i < kLanes; ++i) v[i] = bits >> i & 1u ? v[i] : v[i] * 0.;
    return v;
  }

  template <DType kType>
  static T load_half(const uint16_t* p) {
    T v;
    for (int i = 0; i < kLanes; ++i) v[i] = Element<kType>::load(p[i]);
    return v;
  }
  template <DType kType>
  static void store_half(uint16_t* p, T v) {
    for (int i = 0; i < kLanes; ++i) p[i] = Element<kType>::store(static_cast<float>(v[i]));
  }
  static T load_bf16(const uint16_t* p) { return load_half<DType::bf16>(p); }
  static T load_f16(const uint16_t* p) { return load_half<DType::f16>(p); }
  static void store_bf16(uint16_t* p, T v) { store_half<DType::bf16>(p, v); }
  static void store_f16(uint16_t* p, T v) { store_half<DType::f16>(p, v); }
  static void split(T, T&, T&) {}  // never called: kPairs is false, dwords widened to double are no bit patterns
  static void load_transposed(const char* base, int64_t stride, T out[4]) {
    for (int i = 0; i < kLanes; ++i) {
      const T row = load(reinterpret_cast<const float*>(base + i * stride));
      for (int j = 0; j < kLanes; ++j) out[j][i] = row[j];
    }
  }

  static T sums(const T v[4]) {
    T total{};
    for (int i = 0; i < kLanes; ++i) total[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
    return total;
  }

  struct Table {
    double values[16];
  };
  static Table table(const float* values, float scale) {
    Table t;
    for (int i = 0; i < 16; ++i) t.values[i] = static_cast<double>(values[i]) * scale;
    return t;
  }
  static void look_up(const Table& t, const uint8_t* dwords, int shift, T& even, T& odd) {
    for (int i = 0; i < kLanes; ++i) {
      uint32_t w;
      std::memcpy(&w, dwords + 4 * i, 4);
      even[i] = t.values[w >> shift & 15u];
      odd[i] = t.values[w >> (shift + 16) & 15u];
    }
  }
  static void interleave(T even, T odd, T& first, T& second) {
    first = T{even[0], odd[0], even[1], odd[1]};
    second = T{even[2], odd[2], even[3], odd[3]};
  }
  static void scales(const uint8_t* codes, int count, const float* nested_code, float nested_absmax, float offset, float* out) {
    for (int i = 0; i < count; ++i) {
      const float product = nested_code[codes[i]] * nested_absmax;  // the baseline has no fused multiply-add
      out[i] = product + offset;
    }
  }

  static U set(uint32_t v) { return v; }
  static U iota(uint32_t first) { return first; }
  static U exclusive_or(U a, U b, U c) { return a ^ b ^ c; }
  static void multiply(U a, uint32_t m, U& hi, U& lo) {
    const uint64_t product = static_cast<uint64_t>(a) * m;
    hi = static_cast<uint32_t>(product >> 32);
    lo = static_cast<uint32_t>(product);
  }
  static uint32_t at_least(U v, uint32_t threshold) {
    return ((v & 0xffffu) >= threshold ? 1u : 0u) | ((v >> 16) >= threshold ? 2u : 0u);
  }
};

#include "micro.h"
}  // namespace generic

const Kernels kGeneric = generic::table("generic", Arithmetic{});

}  // namespace lora_ops
