// Quantising to 4 bits and back, in plain C++ for every ISA: memory moves here, arithmetic hardly matters.
//
// Two passes over the weight: the first finds the blocks' scales, block by block, the second encodes chunk by chunk of the
// kernels' layout, row by row. Blocks run across rows, so that a chunk may need several scales, and a scale several rows.
#include "quantize.h"

#include <algorithm>
#include <cstring>

#include "convert.h"
#include "threads.h"

namespace lora_ops {
namespace {

template <DType kType>
using Stored = typename Element<kType>::Stored;

int64_t blocks(const FourBit& w) {
  return (w.N * w.K + w.blocksize - 1) / w.blocksize;
}

// body(first, count, block) for the stretches of [first, last) of the flattened weight that lie in one block each
template <class Body>
void by_block(int64_t first, int64_t last, int64_t blocksize, const Body& body) {
  while (first < last) {
    const int64_t block = first / blocksize, end = std::min(last, (block + 1) * blocksize);
    body(first, static_cast<int>(end - first), block);
    first = end;
  }
}

// body(k, count, stored, bytes) for a row's chunks: weights k .. k + count, nibbles for `stored`, first byte in the row
template <class Body>
void by_chunk(int64_t K, const Body& body) {
  for (int64_t k = 0; k < K; k += kChunk) {
    body(k, static_cast<int>(std::min<int64_t>(K - k, kChunk)), stored_weights(K - k), k / 2);
  }
}

template <DType kType>
int64_t scales(const FourBit& w, const Stored<kType>* weight, int threads) {
  const int64_t size = w.N * w.K, count = blocks(w);
  constexpr int32_t kInfinity = 0x7f800000;
  std::atomic<int64_t> first_bad{count};
  parallel_for(threads, count, [&](int64_t b) {
    const Stored<kType>* from = weight + b * w.blocksize;
    const int64_t n = std::min(w.blocksize, size - b * w.blocksize);
    int32_t largest = 0;  // as integers, magnitudes compare as they do as numbers, and NaN is the largest
    for (int64_t i = 0; i < n; ++i) {
      largest = std::max(largest, static_cast<int32_t>(bits_of(Element<kType>::load(from[i])) & 0x7fffffffu));
    }
    w.absmax[b] = float_of(static_cast<uint32_t>(largest));
    if (largest < kInfinity) return;
    for (int64_t bad = first_bad; b < bad && !first_bad.compare_exchange_weak(bad, b);) {
    }
  });
  const int64_t bad = first_bad;
  if (bad == count) return -1;
  int64_t i = bad * w.blocksize;
  while ((bits_of(Element<kType>::load(weight[i])) & 0x7fffffffu) < static_cast<uint32_t>(kInfinity)) ++i;
  return i;
}

template <DType kType, QuantType kQuant>
void encode(const FourBit& w, const Stored<kType>* weight, int threads) {
  static constexpr Encoder kEncoder{code_table(kQuant)};
  const int64_t size = w.N * w.K, whole = size / w.blocksize, bytes = row_bytes(w.K);
  parallel_for(threads, w.N, [&](int64_t n) {
    by_chunk(w.K, [&](int64_t k, int count, int stored, int64_t byte) {
      uint8_t codes[kChunk];
      std::memset(codes, code_table(kQuant).zero, sizeof codes);
      const int64_t start = n * w.K + k;
      by_block(start, start + count, w.blocksize, [&](int64_t first, int length, int64_t block) {
        const Stored<kType>* from = weight + first;
        uint8_t* to = codes + (first - start);
        const float largest = std::max(w.absmax[block], kSmallestAbsmax);
        if (block < whole) {
          const float factor = 1.f / largest;
          for (int i = 0; i < length; ++i) to[i] = static_cast<uint8_t>(kEncoder(Element<kType>::load(from[i]) * factor));
        } else {  // bitsandbytes divides the last block, where it is not a whole one
          for (int i = 0; i < length; ++i) to[i] = static_cast<uint8_t>(kEncoder(Element<kType>::load(from[i]) / largest));
        }
      });
      pack_codes(stored, codes, w.codes + n * bytes + byte);
    });
  });
  if (whole < blocks(w)) w.absmax[whole] = std::max(w.absmax[whole], kSmallestAbsmax);
}

template <DType kType, QuantType kQuant>
void decode(const FourBit& w, Stored<kType>* weight, int threads) {
  static constexpr CodeTable kTable = code_table(kQuant);
  const int64_t bytes = row_bytes(w.K);
  parallel_for(threads, w.N, [&](int64_t n) {
    by_chunk(w.K, [&](int64_t k, int count, int stored, int64_t byte) {
      uint8_t codes[kChunk];
      unpack_codes(stored, w.codes + n * bytes + byte, codes);
      const int64_t start = n * w.K + k;
      by_block(start, start + count, w.blocksize, [&](int64_t first, int length, int64_t block) {
        const uint8_t* from = codes + (first - start);
        Stored<kType>* to = weight + first;
        const float scale = w.absmax[block];
        for (int i = 0; i < length; ++i) to[i] = Element<kType>::store(kTable.values[from[i]] * scale);
      });
    });
  });
}

template <DType kType>
int64_t quantize_as(const FourBit& w, const void* from, int threads) {
  const auto* weight = static_cast<const Stored<kType>*>(from);
  const int64_t bad = scales<kType>(w, weight, threads);
  if (bad >= 0) return bad;
  w.type == QuantType::nf4 ? encode<kType, QuantType::nf4>(w, weight, threads)
                           : encode<kType, QuantType::fp4>(w, weight, threads);
  return -1;
}

template <DType kType>
void dequantize_as(const FourBit& w, void* to, int threads) {
  auto* weight = static_cast<Stored<kType>*>(to);
  w.type == QuantType::nf4 ? decode<kType, QuantType::nf4>(w, weight, threads)
                           : decode<kType, QuantType::fp4>(w, weight, threads);
}

// Two rows hold a whole number of bytes of bitsandbytes' packing, so that no byte has two writers.
constexpr int64_t kRowPair = 2;

}  // namespace

int64_t quantize_4bit(const FourBit& w, const void* weight, DType dtype, int threads) {
  if (dtype == DType::f32) return quantize_as<DType::f32>(w, weight, threads);
  return dtype == DType::bf16 ? quantize_as<DType::bf16>(w, weight, threads) : quantize_as<DType::f16>(w, weight, threads);
}

void dequantize_4bit(const FourBit& w, void* weight, DType dtype, int threads) {
  if (dtype == DType::f32) return dequantize_as<DType::f32>(w, weight, threads);
  dtype == DType::bf16 ? dequantize_as<DType::bf16>(w, weight, threads) : dequantize_as<DType::f16>(w, weight, threads);
}

void to_bitsandbytes(const FourBit& w, uint8_t* packed, int threads) {
  const int64_t bytes = row_bytes(w.K);
  parallel_for(threads, (w.N + kRowPair - 1) / kRowPair, [&](int64_t pair) {
    for (int64_t n = pair * kRowPair; n < std::min((pair + 1) * kRowPair, w.N); ++n) {
      by_chunk(w.K, [&](int64_t k, int count, int stored, int64_t byte) {
        uint8_t codes[kChunk];
        unpack_codes(stored, w.codes + n * bytes + byte, codes);
        uint8_t* to = packed + (n * w.K + k) / 2;
        int i = 0;
        if ((n * w.K + k) % 2 == 1) *to++ |= codes[i++];
        for (; i + 1 < count; i += 2) *to++ = static_cast<uint8_t>(codes[i] << 4 | codes[i + 1]);
        if (i < count) *to = static_cast<uint8_t>(codes[i] << 4);
      });
    }
  });
  if (w.N * w.K % 2 == 1) packed[w.N * w.K / 2] |= code_table(w.type).zero;
}

void from_bitsandbytes(const FourBit& w, const uint8_t* packed, int threads) {
  const int64_t bytes = row_bytes(w.K);
  parallel_for(threads, w.N, [&](int64_t n) {
    by_chunk(w.K, [&](int64_t k, int count, int stored, int64_t byte) {
      uint8_t codes[kChunk];
      std::memset(codes, code_table(w.type).zero, sizeof codes);
      const uint8_t* from = packed + (n * w.K + k) / 2;
      int i = 0;
      if ((n * w.K + k) % 2 == 1) codes[i++] = *from++ & 15;
      for (; i + 1 < count; i += 2, ++from) {
        codes[i] = *from >> 4;
        codes[i + 1] = *from & 15;
      }
      if (i < count) codes[i] = *from >> 4;
      pack_codes(stored, codes, w.codes + n * bytes + byte);
    });
  });
}

}  // namespace lora_ops
