// dot_codes (four_bit.h) for an x in bf16, with the 16 values rounded to bf16: half the work of the exact ones, and a smaller
// error than rounding every weight, which is what multiplying in bf16 costs anyway (-1, 0 and 1 are exact, and no scale is
// rounded). Included after micro.h inside a `#pragma GCC target` region and namespace, so without guard, where V has
//
//     Planes         low and high bytes of the rounded values, from `planes`
//     look_up_bytes  the values of 4 * kLanes bytes' low or high nibbles by two byte shuffles: of words i with (i % 8) / 4 = h,
//                    the even bytes' to even[h], the odd ones' to odd[h]
//
// For one or two rows of x: with more, the multiplications outweigh the decoding.
//
// A chunk's even bytes hold groups 0 and 1 of 32 weights, its odd ones 2 and 3 (nf4.h). A group's products are added up alone
// and scaled once.

constexpr int kWordsAtOnce = kPanel;

// Of every kWordsAtOnce neighbours first those with (i % 8) / 4 = 0: the order in which byte shuffles leave the words.
inline void dot_order_rounded(const Matrix& src, int64_t k, Mask mask, float* out) {
  ordered_chunks(src, k, mask, out, [](int i) { return i % 8 / 4 * kLanes + i / 8 * 4 + i % 4; });
}

// acc[0][i] + acc[1][i] += x[i] · a chunk of codes; group g's scale is scale[(at + g * kGroup) >> shift]. With kWide
// neighbouring groups share theirs. kBytes: 1 where only even bytes hold weights.
template <int kLeft, bool kWide, int kBytes>
__attribute__((always_inline)) inline void dot_chunk(const typename V::Planes& planes, const uint8_t* chunk, const float* x,
                                                     int64_t x_stride, const float* scale, uint64_t at, int shift,
                                                     typename V::T (&acc)[2][kLeft]) {
  using T = typename V::T;
  T group[2][2][kLeft];  // [nibble][even, odd bytes]
#pragma GCC unroll 2
  for (int nibble = 0; nibble < 2; ++nibble) {
#pragma GCC unroll 4
    for (int w = 0; w < kWords; w += kWordsAtOnce) {
      T value[2][2];  // [even, odd bytes][place]
      V::look_up_bytes(planes, chunk + 2 * w, nibble, value[0], value[1]);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h)
#pragma GCC unroll 2
        for (int odd = 0; odd < kBytes; ++odd)
#pragma GCC unroll 8
          for (int i = 0; i < kLeft; ++i) {
            const T v = V::load(x + i * x_stride + (2 * odd + nibble) * kGroup + w + h * kLanes);
            T& sum = group[nibble][odd][i];
            sum = w + h == 0 ? V::mul(v, value[odd][h]) : V::fma(v, value[odd][h], sum);
          }
    }
#pragma GCC unroll 2
    for (int odd = 0; odd < kBytes && !(kWide && nibble == 0); ++odd) {
      const T by = V::broadcast(scale + ((at + (2 * odd + nibble) * kGroup) >> shift));
#pragma GCC unroll 8
      for (int i = 0; i < kLeft; ++i) {
        T& sum = group[nibble][odd][i];
        if (kWide) sum = V::add(sum, group[0][odd][i]);
        acc[odd][i] = V::fma(sum, by, acc[odd][i]);
      }
    }
  }
}

// c[i][j] += left[i] · weight[row + j], for kLeft x kRight = kLanes pairs at most
template <int kLeft, bool kWide>
void dot_rounded_rows(const float* left, int64_t left_stride, const QuantizedWeight& w, int64_t row, int cols, int64_t k0,
                      int64_t k, float* c) {
  using T = typename V::T;
  constexpr int kRight = kLanes / kLeft;
  const int64_t bytes = row_bytes(w.K);
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(w.blocksize));
  const typename V::Planes planes = V::planes(w.values);
  T sums[kLanes];
#pragma GCC unroll 16
  for (int a = 0; a < kLanes; ++a) sums[a] = V::zero();
  for (int j = 0; j < kRight && j < cols; ++j) {
    const uint8_t* codes = w.codes + (row + j) * bytes;
    T acc[2][kLeft];
#pragma GCC unroll 8
    for (int i = 0; i < kLeft; ++i) acc[0][i] = acc[1][i] = V::zero();
    for (int64_t s = 0; s < k; s += kScaleSpan) {
      const int64_t count = k - s < kScaleSpan ? k - s : kScaleSpan;
      const int64_t flat = (row + j) * w.K + k0 + s, first = flat >> shift;
      const int64_t blocks = ((flat + count - 1) >> shift) - first + 1;
      float scale[kScaleSpan / kGroup + kGroups + kLanes];
      scales_of(w, first, blocks, scale);
      for (int g = 0; g < kGroups; ++g) scale[blocks + g] = 0.f;  // a last chunk has groups beyond the row, where x is zero
      uint64_t at = static_cast<uint64_t>(flat - (first << shift));
      const uint8_t* chunk = codes + ((k0 + s) >> 1);
      const float* x = left + s;
      int64_t c0 = 0;
      for (; c0 + kChunk <= count; c0 += kChunk, at += kChunk, chunk += kChunkBytes, x += kChunk) {
        __builtin_prefetch(chunk + 2 * bytes, 0, 3);  // the rows after this one
        dot_chunk<kLeft, kWide, 2>(planes, chunk, x, left_stride, scale, at, shift, acc);
      }
      if (c0 == count) continue;
      if (stored_weights(count - c0) == kChunk) {
        dot_chunk<kLeft, kWide, 2>(planes, chunk, x, left_stride, scale, at, shift, acc);
      } else {
        uint8_t own[kChunkBytes];
        dot_chunk<kLeft, kWide, 1>(planes, chunk_at(chunk, 0, count - c0, own), x, left_stride, scale, at, shift, acc);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kLeft; ++i) sums[i * kRight + j] = V::add(acc[0][i], acc[1][i]);
  }
  alignas(64) float lanes[kLanes];
  V::store(lanes, V::sums(sums));
  for (int i = 0; i < kLeft; ++i)
    for (int j = 0; j < kRight && j < cols; ++j) c[i * kPanel + j] += lanes[i * kRight + j];
}

template <int kLeft>
void dot_rounded_as(const float* left, int64_t left_stride, const QuantizedWeight& w, int64_t row, int cols, int64_t k0,
                    int64_t k, float* c) {
  constexpr int kRight = kLanes / kLeft;
  const bool wide = w.blocksize >= 2 * kGroup && w.K % (2 * kGroup) == 0;
  for (int j = 0; j < cols; j += kRight) {
    wide ? dot_rounded_rows<kLeft, true>(left, left_stride, w, row + j, cols - j, k0, k, c + j)
         : dot_rounded_rows<kLeft, false>(left, left_stride, w, row + j, cols - j, k0, k, c + j);
  }
}

inline void dot_rounded(int rows, const float* left, int64_t left_stride, const QuantizedWeight& w, int64_t row, int cols,
                        int64_t k0, int64_t k, float* c) {
  (rows == 1 ? dot_rounded_as<1> : dot_rounded_as<2>)(left, left_stride, w, row, cols, k0, k, c);
}

constexpr Kernels with_rounded_codes(Kernels kernels) {
  kernels.codes_bf16 = {dot_rounded, dot_order_rounded};
  kernels.few_rows_bf16.rounded = 2;
  return kernels;
}
