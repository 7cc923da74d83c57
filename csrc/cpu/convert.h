// Half-precision elements in plain C++, free of branches so that the compiler can vectorise a loop over them. Conversions to
// half precision round to nearest even; none of them depends on subnormal operands, which a thread may have set to be flushed.
#pragma once

#include <cstdint>
#include <cstring>

#include "../params.h"

namespace lora_ops {

inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

template <DType kType>
struct Element;

template <>
struct Element<DType::f32> {
  using Stored = float;
  static float load(float v) { return v; }
  static float store(float v) { return v; }
};

template <>
struct Element<DType::bf16> {
  using Stored = uint16_t;
  static float load(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }
  static uint16_t store(float v) {
    const uint32_t bits = bits_of(v), rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
};

// All ones if a < b, for a and b below 2^31. A select on a condition would do, but GCC makes branches of several on one.
inline uint32_t below(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<int32_t>(a - b) >> 31);
}

template <>
struct Element<DType::f16> {
  using Stored = uint16_t;
  static float load(uint16_t h) {
    const uint32_t rest = (h & 0x7fffu) << 13;
    const uint32_t subnormal = below(rest, 0x00800000u);                // then it is (1 + m) 2^-14 - 2^-14
    const uint32_t infinite = ~below(rest, 0x0f800000u) & 0x38000000u;  // infinity and NaN stay what they are
    const uint32_t exponent = 0x38000000u + (subnormal & 0x00800000u) + infinite;
    const float v = float_of(rest + exponent) - float_of(subnormal & 0x38800000u);
    return float_of((h & 0x8000u) << 16 | bits_of(v));
  }
  static uint16_t store(float v) {
    const uint32_t bits = bits_of(v), rest = bits & 0x7fffffffu;
    const uint32_t subnormal =
        below(rest, 0x38800000u);  // below 2^-14: 0.5's last place is 2^-24, and the adder rounds to that
    const uint32_t sum = bits_of(float_of(rest) + float_of(subnormal & 0x3f000000u));
    const uint32_t normal = (sum - 0x38000000u + 0xfffu + (sum >> 13 & 1u)) >> 13;
    const uint32_t infinite = 0x7c00u | (below(0x7f800000u, rest) & 0x0200u);
    const uint32_t finite = below(rest, 0x477ff000u);  // 65520 rounds to infinity
    const uint32_t magnitude = (subnormal & (sum - 0x3f000000u)) | (finite & ~subnormal & normal) | (~finite & infinite);
    return static_cast<uint16_t>((bits >> 16 & 0x8000u) | magnitude);
  }
};

}  // namespace lora_ops
