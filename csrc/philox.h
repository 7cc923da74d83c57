// The dropout generator: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
//
// Element (row, col) of x owns 16 random bits, whatever the tiling, the thread count or the device:
//
//     group   = col / 128                      128 neighbouring columns share 16 counters
//     counter = (16 * group + (col % 32) / 2,  row,  row >> 32,  0)        key = (seed, seed >> 32)
//     word    = (col % 128) / 32               which of the counter's four 32-bit outputs
//     bits    = output[word] >> 16 * (col % 2)  & 0xffff
//
// One vector of 16 counters thus gives, word by word, 32 neighbouring columns in order: a compare of 16-bit lanes is
// the mask of 32 columns.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LORA_OPS_HOST_DEVICE __host__ __device__
#else
#define LORA_OPS_HOST_DEVICE
#endif

namespace lora_ops {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;

constexpr int kDropoutGroup = 128;  // columns that one set of 16 counters covers
constexpr int kDropoutCounters = 16;
constexpr int kDropoutWords = 4;  // 32-column mask words per group
static_assert(kDropoutGroup == kDropoutCounters * 2 * kDropoutWords, "two 16-bit numbers per 32-bit output");

struct Philox4 {
  uint32_t v[4];
};

LORA_OPS_HOST_DEVICE inline Philox4 philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    const uint32_t hi0 = static_cast<uint32_t>(p0 >> 32), hi1 = static_cast<uint32_t>(p1 >> 32);
    c0 = hi1 ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = hi0 ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace lora_ops
