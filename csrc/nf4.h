// 4-bit weights: the values of the codes, the encode rule and the memory layout, host and device.
//
// A weight (N, K) is flattened row by row and cut into blocks of `blocksize`; block b of the flattened weight has one scale:
//
//     weight[n][k] = values[code[n][k]] * absmax[(n * K + k) / blocksize]          in fp32, rounded once to the asked type
//
// Both code tables are bitsandbytes': nf4 (Dettmers et al., "QLoRA", NeurIPS 2023) and fp4.
//
// Kernels read codes in an order of their own. A row is cut into chunks of 128 weights, 64 bytes, 32 little-endian words of
// 16 bits: nibble j of word w is the code of weight 32 j + w of the chunk, so that one load, a shift and a mask give 32
// neighbouring weights in the lanes of a vector. What is left of a row, K % 128 weights:
//
//     none       nothing
//     1 .. 64    32 bytes: byte w holds weight w in its low and weight 32 + w in its high nibble
//     65 .. 127  a whole chunk
//
// Nibbles beyond the row are the code of zero. The scales stay in the order of the flattened weight.
#pragma once

#include <cstdint>

#ifndef LORA_OPS_HOST_DEVICE
#if defined(__CUDACC__)
#define LORA_OPS_HOST_DEVICE __host__ __device__
#else
#define LORA_OPS_HOST_DEVICE
#endif
#endif

namespace lora_ops {

enum class QuantType : int { nf4 = 0, fp4 = 1 };

constexpr int kCodes = 16;

struct CodeTable {
  float values[kCodes];
  uint8_t ascending[kCodes];  // the codes in the order of their values
  uint8_t zero;               // the code of zero
};

constexpr CodeTable kNf4 = {
    {-1.f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
     -0.09105003625154495f, 0.f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.f},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    7};

// Code 8 is a second zero, which the encode rule gives to what is positive and rounds to zero.
constexpr CodeTable kFp4 = {{0.f, 0.0625f / 12, 8.f / 12, 1.f, 4.f / 12, 6.f / 12, 2.f / 12, 3.f / 12, 0.f, -0.0625f / 12,
                             -8.f / 12, -1.f, -4.f / 12, -6.f / 12, -2.f / 12, -3.f / 12},
                            {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3},
                            0};

constexpr const CodeTable& code_table(QuantType type) {
  return type == QuantType::nf4 ? kNf4 : kFp4;
}

// The encode rule, as 15 comparisons that add up and leave no branch: code = first + Σ_i (v > bound[i] ? step[i] : 0), with
// the midpoints between neighbouring values as bounds and v = weight / absmax. A midpoint itself goes down.
struct Encoder {
  float bound[kCodes - 1];
  int32_t step[kCodes - 1];
  int32_t first;

  LORA_OPS_HOST_DEVICE constexpr explicit Encoder(const CodeTable& t) : bound(), step(), first(t.ascending[0]) {
    for (int i = 0; i + 1 < kCodes; ++i) {
      bound[i] = (t.values[t.ascending[i]] + t.values[t.ascending[i + 1]]) / 2;
      step[i] = t.ascending[i + 1] - t.ascending[i];
    }
  }
  LORA_OPS_HOST_DEVICE int32_t operator()(float v) const {
    int32_t code = first;
    for (int i = 0; i + 1 < kCodes; ++i) code += v > bound[i] ? step[i] : 0;
    return code;
  }
};

constexpr float kSmallestAbsmax = 1e-38f;  // what a block is divided by, at least

constexpr int kChunk = 128;              // weights
constexpr int kChunkBytes = kChunk / 2;  // 32 words of 4 nibbles
constexpr int kWords = kChunkBytes / 2;  // weights between neighbouring nibbles of a word
constexpr int kShortTail = 2 * kWords;   // what is left of a row and fits two nibbles per byte
constexpr int kShortTailBytes = kShortTail / 2;
static_assert(kChunk == 4 * kWords && kShortTail == kChunk / 2, "a word has four nibbles, a short tail's byte two");

// How many weights' nibbles are stored where `left` > 0 weights of a row are left: a chunk's, or a short tail's.
LORA_OPS_HOST_DEVICE constexpr int stored_weights(int64_t left) {
  return left > kShortTail ? kChunk : kShortTail;
}

// Bytes of a row of K codes.
LORA_OPS_HOST_DEVICE constexpr int64_t row_bytes(int64_t K) {
  return K / kChunk * kChunkBytes + (K % kChunk == 0 ? 0 : stored_weights(K % kChunk) / 2);
}

// Codes of `stored` = kChunk or kShortTail weights, one per byte, to stored / 2 bytes of a row.
LORA_OPS_HOST_DEVICE inline void pack_codes(int stored, const uint8_t* codes, uint8_t* bytes) {
  if (stored == kChunk) {
    for (int w = 0; w < kWords; ++w) {
      bytes[2 * w] = static_cast<uint8_t>(codes[w] | codes[kWords + w] << 4);
      bytes[2 * w + 1] = static_cast<uint8_t>(codes[2 * kWords + w] | codes[3 * kWords + w] << 4);
    }
  } else {
    for (int w = 0; w < kWords; ++w) bytes[w] = static_cast<uint8_t>(codes[w] | codes[kWords + w] << 4);
  }
}

// The way back.
LORA_OPS_HOST_DEVICE inline void unpack_codes(int stored, const uint8_t* bytes, uint8_t* codes) {
  if (stored == kChunk) {
    for (int w = 0; w < kWords; ++w) {
      codes[w] = bytes[2 * w] & 15;
      codes[kWords + w] = bytes[2 * w] >> 4;
      codes[2 * kWords + w] = bytes[2 * w + 1] & 15;
      codes[3 * kWords + w] = bytes[2 * w + 1] >> 4;
    }
  } else {
    for (int w = 0; w < kWords; ++w) {
      codes[w] = bytes[w] & 15;
      codes[kWords + w] = bytes[w] >> 4;
    }
  }
}

}  // namespace lora_ops
