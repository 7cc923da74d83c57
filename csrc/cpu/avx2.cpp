// AVX2 with FMA and F16C: fp32 arithmetic, 6 x 16 tiles.
#include <immintrin.h>

#include <cstring>

#include "../nf4.h"
#include "../philox.h"
#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")

namespace lora_ops {
namespace avx2 {

struct V {
  using T = __m256;
  using U = __m256i;
  static constexpr int kLanes = 8;
  static constexpr int kRows = 6;
  static constexpr int kCounters = 8;
  static constexpr int kShortestChain = 8;
  static constexpr bool kPairs = true;
  static constexpr FewRows kFewRows = {8, 4, 8};
  static constexpr int kFetchedFrom = 1;

  static T zero() { return _mm256_setzero_ps(); }
  static T load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, T v) { _mm256_storeu_ps(p, v); }
  static T broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static T add(T a, T b) { return _mm256_add_ps(a, b); }
  static T mul(T a, T b) { return _mm256_mul_ps(a, b); }
  static T fma(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
  static void pin(T& v) { asm("" : "+x"(v)); }
  static T keep_bit(T v, const uint32_t* words, int bit) {
    const __m256i on = _mm256_set1_epi32(static_cast<int>(1u << bit));
    const __m256i kept = _mm256_and_si256(_mm256_load_si256(reinterpret_cast<const __m256i*>(words)), on);
    return _mm256_blendv_ps(mul(v, zero()), v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(kept, on)));
  }
  static T keep(T v, uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i on = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
    return _mm256_blendv_ps(mul(v, zero()), v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(on, lane)));
  }

  static T load_bf16(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static T load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void split(T both, T& even, T& odd) {
    const __m256i bits = _mm256_castps_si256(both);
    even = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  // Round to nearest even, NaN to 0x7fc0: bit for bit what torch does.
  static void store_bf16(uint16_t* p, T v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static void store_f16(uint16_t* p, T v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  // 8 x 8 in two strips of four columns: rows i and 4 + i meet in one vector while they are loaded, which leaves 4 x 4
  // transpositions inside 128-bit lanes.
  static void load_transposed(const char* base, int64_t stride, T out[8]) {
    const auto quad = [](const char* p) { return _mm_loadu_ps(reinterpret_cast<const float*>(p)); };
#pragma GCC unroll 2
    for (int s = 0; s < 8; s += 4) {
      T q[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const char* at = base + i * stride + s * 4;
        q[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(quad(at)), quad(at + 4 * stride), 1);
      }
      const T a = _mm256_unpacklo_ps(q[0], q[1]), b = _mm256_unpackhi_ps(q[0], q[1]);
      const T c = _mm256_unpacklo_ps(q[2], q[3]), d = _mm256_unpackhi_ps(q[2], q[3]);
      out[s] = _mm256_shuffle_ps(a, c, 0x44);
      out[s + 1] = _mm256_shuffle_ps(a, c, 0xee);
      out[s + 2] = _mm256_shuffle_ps(b, d, 0x44);
      out[s + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
  }

  static T sums(const T v[8]) {
    T q[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      q[i] = _mm256_hadd_ps(_mm256_hadd_ps(v[4 * i], v[4 * i + 1]), _mm256_hadd_ps(v[4 * i + 2], v[4 * i + 3]));
    }
    return _mm256_add_ps(_mm256_permute2f128_ps(q[0], q[1], 0x20), _mm256_permute2f128_ps(q[0], q[1], 0x31));
  }

  // 16 values times a scale, looked up by four bits of dwords: `even` by nibble `shift` / 4, `odd` by the one 16 bits on.
  struct Table {
    T low, high;
  };
  static Table table(const float* values, float scale) {
    const T s = _mm256_set1_ps(scale);
    return {_mm256_mul_ps(load(values), s), _mm256_mul_ps(load(values + 8), s)};
  }
  static T look_up(const Table& t, __m256i index) {
    const T low = _mm256_permutevar8x32_ps(t.low, index), high = _mm256_permutevar8x32_ps(t.high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  static void look_up(const Table& t, const uint8_t* dwords, int shift, T& even, T& odd) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(dwords));
    even = look_up(t, _mm256_srli_epi32(w, shift));
    odd = look_up(t, _mm256_srli_epi32(w, shift + 16));
  }
  // The same from the low and the high bytes of 16 values in bf16: a byte shuffle looks up 32 codes at once.
  struct Planes {
    __m256i low, high;
  };
  static Planes planes(const float* values) {
    alignas(32) uint16_t rounded[16];
    store_bf16(rounded, load(values));
    store_bf16(rounded + 8, load(values + 8));
    alignas(16) uint8_t low[16], high[16];
    for (int i = 0; i < 16; ++i) low[i] = static_cast<uint8_t>(rounded[i]), high[i] = static_cast<uint8_t>(rounded[i] >> 8);
    const auto twice = [](const uint8_t* p) {
      return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
    };
    return {twice(low), twice(high)};
  }
  static void look_up_bytes(const Planes& p, const uint8_t* bytes, int nibble, T even[2], T odd[2]) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
    const __m256i code = _mm256_and_si256(nibble ? _mm256_srli_epi16(w, 4) : w, _mm256_set1_epi8(15));
    const __m256i low = _mm256_shuffle_epi8(p.low, code), high = _mm256_shuffle_epi8(p.high, code);
    split(_mm256_castsi256_ps(_mm256_unpacklo_epi8(low, high)), even[0], odd[0]);
    split(_mm256_castsi256_ps(_mm256_unpackhi_epi8(low, high)), even[1], odd[1]);
  }
  // even[0], odd[0], even[1], ...
  static void interleave(T even, T odd, T& first, T& second) {
    const T low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    first = _mm256_permute2f128_ps(low, high, 0x20);
    second = _mm256_permute2f128_ps(low, high, 0x31);
  }
  // `count` <= kLanes scales: rounded after the product and after the sum, so the two must not become one operation. No gather:
  // AMD's cores take it apart into 40 operations.
  static void scales(const uint8_t* codes, int count, const float* nested_code, float nested_absmax, float offset, float* out) {
    for (int i = 0; i < count; ++i) {
      float v = nested_code[codes[i]] * nested_absmax;
      asm("" : "+x"(v));
      out[i] = v + offset;
    }
  }

  static U set(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
  static U iota(uint32_t first) { return _mm256_add_epi32(set(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
  static U exclusive_or(U a, U b, U c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
  static void multiply(U a, uint32_t m, U& hi, U& lo) {
    const U by = _mm256_set1_epi64x(static_cast<int64_t>(m));
    const U even = _mm256_mul_epu32(a, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), by);
    hi = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    lo = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  }
  static uint32_t at_least(U v, uint32_t threshold) {
    const U bound = _mm256_set1_epi16(static_cast<int16_t>(threshold));
    const U kept = _mm256_cmpeq_epi16(_mm256_max_epu16(v, bound), v);
    return _pext_u32(static_cast<uint32_t>(_mm256_movemask_epi8(kept)), 0x55555555u);
  }
};

#include "micro.h"
#include "rounded_codes.h"
}  // namespace avx2

const Kernels kAvx2 = avx2::with_rounded_codes(avx2::table("avx2", Arithmetic{}));

}  // namespace lora_ops

#pragma GCC pop_options
