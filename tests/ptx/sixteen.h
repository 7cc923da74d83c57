// bf16 and fp16, bits to float and back: to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace ptx {

inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float bf16_to_float(uint16_t bits) {
  return bits_to_float(uint32_t{bits} << 16);
}
inline uint16_t float_to_bf16(float f) {
  const uint32_t bits = float_to_bits(f);
  if (f != f) return 0x7fff;  // PTX's canonical NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float fp16_to_float(uint16_t bits) {
  _Float16 h;
  std::memcpy(&h, &bits, 2);
  return static_cast<float>(h);
}
inline uint16_t float_to_fp16(float f) {
  if (f != f) return 0x7fff;
  const auto h = static_cast<_Float16>(f);
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}

}  // namespace ptx
