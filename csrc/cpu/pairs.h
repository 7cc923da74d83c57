// Packing of bf16 operands without widening: a dword holds elements k and k + 1, an odd last k is paired with zero. Included
// after transposed_codes.h inside a `#pragma GCC target` region and namespace, so without guard.

// Pairs of k elements, padded to a multiple.
template <int kMultiple>
constexpr int64_t padded_pairs(int64_t k) {
  return ((k + 1) / 2 + kMultiple - 1) / kMultiple * kMultiple;
}

template <int kMultiple>
void pack_pairs_transposed(const Matrix& src, int rows, int64_t k, float* out) {
  const int64_t pairs = padded_pairs<kMultiple>(k);
  __m512 v[16];
  for (int64_t p0 = 0; p0 < pairs; p0 += 16, out += 16 * 16) {
    if (rows == 16 && 2 * (p0 + 16) <= k) {
      V::load_transposed(src.at(0, 2 * p0), src.row_stride * 2, v);
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) V::store(out + j * 16, v[j]);
      continue;
    }
    alignas(64) char part[16][64] = {};
    const int64_t count = k - 2 * p0 < 32 ? k - 2 * p0 : 32;
    for (int i = 0; i < rows; ++i) std::memcpy(part[i], src.at(i, 2 * p0), count * 2);
    V::load_transposed(part[0], 64, v);
    for (int64_t j = 0; j < 16 && p0 + j < pairs; ++j) V::store(out + j * 16, v[j]);
  }
}

// Elements k, `even`, and k + 1, `odd`, of 16 rows, rounded to their pairs.
struct Paired {
  static constexpr int kFloats = 16;
  static void store(float* out, __m512 even, __m512 odd) {
    const __m512i in_turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                             20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(in_turn, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even))));
  }
};

// A tile of pairs as fp32: a dword's lower half is element k of its row, the upper one k + 1.
inline void widen_pairs(float* tile, int64_t k, const float* scale, float* out) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int64_t s = 0; s < k; s += 2, tile += 16, out += 2 * 16) {
    const __m512i pairs = _mm512_loadu_si512(tile);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
    V::store(out, even);
    if (s + 1 < k) V::store(out + 16, odd);
    if (scale) Paired::store(tile, V::mul(even, V::broadcast(scale + s)), V::mul(odd, V::broadcast(scale + s + 1)));
  }
}

// Elements j and 16 + j of rows s and s + 1, interleaved into two vectors of pairs.
template <int kMultiple>
void pack_pairs_straight(const Matrix& src, int64_t cols, int64_t k, Mask, float* out, int vectors, int64_t vector_stride) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                       35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t s = 0; s < 2 * padded_pairs<kMultiple>(k); s += 2, out += 16) {
    const char* fetched = src.at(s + kFetchedRows, 0);
    for (int v = 0; v < vectors; v += 2) {
      const int64_t count = cols - v * 16;
      __builtin_prefetch(fetched + v * 32, 0, 2);
      __builtin_prefetch(fetched + src.row_stride * 2 + v * 32, 0, 2);
      const __mmask32 have = count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0u;
      const __m512i a = s < k ? _mm512_maskz_loadu_epi16(have, src.at(s, v * 16)) : _mm512_setzero_si512();
      const __m512i b = s + 1 < k ? _mm512_maskz_loadu_epi16(have, src.at(s + 1, v * 16)) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + v * vector_stride, _mm512_permutex2var_epi16(a, low, b));
      if (v + 1 < vectors) _mm512_storeu_si512(out + (v + 1) * vector_stride, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

// decode (four_bit.h) to bf16: a chunk's words, shifted by 4 j, look up 32 neighbouring weights at once in the 16 scaled and
// rounded values. These lie there twice: the fifth bit of an index is another code's.
inline void decode_pairs(const QuantizedWeight& w, int64_t row, int64_t k0, int64_t k, DType to, char* out,
                         int64_t group_stride) {
  if (to != DType::bf16 || w.K % kGroup) return decode(w, row, k0, k, to, out, group_stride);
  const uint8_t* codes = w.codes + row * row_bytes(w.K);
  const int64_t at = row * w.K + k0;  // in the flattened weight
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(w.blocksize));
  const int64_t first = at >> shift;
  float scale[kMostDecoded / kGroup + 1 + kLanes];
  scales_of(w, first, ((at + k - 1) >> shift) - first + 1, scale);
  const __m512 values = V::load(w.values);
  uint8_t own[kChunkBytes];
  __m512i table = _mm512_setzero_si512();
  int64_t block = -1;
  for (int64_t c = 0; c < k; c += kChunk) {
    const uint8_t* chunk = chunk_at(codes, k0 + c, w.K, own);
    __builtin_prefetch(chunk + kMostDecoded / 2, 0, 3);
    const __m512i words = _mm512_loadu_si512(chunk);
#pragma GCC unroll 4
    for (int j = 0; j < kGroups; ++j, out += group_stride) {
      const int64_t i = c + j * kGroup;
      if (i >= k) break;
      if (const int64_t b = (at + i) >> shift; b != block) {
        block = b;
        const __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(scale[b - first]));
        table = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(scaled, scaled));
      }
      _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * j), table));
    }
  }
}

constexpr Kernels with_pairs(Kernels kernels) {
  kernels.decode = decode_pairs;
  kernels.bf16.decode_transposed = decode_transposed<Paired>;
  return kernels;
}
