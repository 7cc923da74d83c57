// The vector type of the AVX-512 files. Included inside their `#pragma GCC target` region and namespace, so without guard.

struct V {
  using T = __m512;
  using U = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kRows = 14;
  static constexpr int kCounters = 16;
  static constexpr int kShortestChain = 8;
  static constexpr bool kPairs = true;
  static constexpr FewRows kFewRows = {40, 12, 8};
  static constexpr int kFetchedFrom = 8;

  static T zero() { return _mm512_setzero_ps(); }
  static T load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, T v) { _mm512_storeu_ps(p, v); }
  static T broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static T add(T a, T b) { return _mm512_add_ps(a, b); }
  static T mul(T a, T b) { return _mm512_mul_ps(a, b); }
  static T fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
  static void pin(T& v) { asm("" : "+v"(v)); }
  static T keep_bit(T v, const uint32_t* words, int bit) {
    const __mmask16 dropped = _mm512_testn_epi32_mask(_mm512_load_si512(words), _mm512_set1_epi32(1u << bit));
    return _mm512_mask_mul_ps(v, dropped, v, zero());
  }
  static T keep(T v, uint32_t bits) { return _mm512_mask_mul_ps(v, static_cast<__mmask16>(~bits), v, zero()); }

  static T load_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static T load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void split(T both, T& even, T& odd) {
    const __m512i bits = _mm512_castps_si512(both);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  // Round to nearest even, NaN to 0x7fc0: bit for bit what torch does (vcvtneps2bf16 would flush denormals).
  static void store_bf16(uint16_t* p, T v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
  }
  static void store_f16(uint16_t* p, T v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  // 16 x 16 in two strips of eight columns: rows i and 8 + i meet in one vector while they are loaded, then pairs, quads,
  // and the 128-bit lanes that hold rows 0-3, 4-7 | 8-11, 12-15 of one column. Both halves of a cache line are loaded
  // together: rows a power of two apart share one set of L1, which does not hold sixteen lines.
  static void load_transposed(const char* base, int64_t stride, T out[16]) {
    const __m512i even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), odd = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    const char* below = base + 8 * stride;
    const auto half = [](const char* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); };
    T t[2][8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
#pragma GCC unroll 2
      for (int s = 0; s < 2; ++s) {
        const int64_t at = i * stride + s * 32;
        t[s][i] = _mm512_insertf32x8(_mm512_castps256_ps512(half(base + at)), half(below + at), 1);
      }
#pragma GCC unroll 2
    for (int s = 0; s < 2; ++s) {
      T u[8];
#pragma GCC unroll 4
      for (int i = 0; i < 8; i += 2) {
        u[i] = _mm512_unpacklo_ps(t[s][i], t[s][i + 1]);
        u[i + 1] = _mm512_unpackhi_ps(t[s][i], t[s][i + 1]);
      }
      T q[8];
#pragma GCC unroll 2
      for (int i = 0; i < 8; i += 4) {
        q[i] = _mm512_shuffle_ps(u[i], u[i + 2], 0x44);
        q[i + 1] = _mm512_shuffle_ps(u[i], u[i + 2], 0xee);
        q[i + 2] = _mm512_shuffle_ps(u[i + 1], u[i + 3], 0x44);
        q[i + 3] = _mm512_shuffle_ps(u[i + 1], u[i + 3], 0xee);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512d a = _mm512_castps_pd(q[j]), b = _mm512_castps_pd(q[4 + j]);
        out[8 * s + j] = _mm512_castpd_ps(_mm512_permutex2var_pd(a, even, b));
        out[8 * s + 4 + j] = _mm512_castpd_ps(_mm512_permutex2var_pd(a, odd, b));
      }
    }
  }

  static T sums(const T v[16]) {
    T p[8], q[4], r[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      p[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      q[i] = _mm512_add_ps(_mm512_shuffle_ps(p[2 * i], p[2 * i + 1], 0x44), _mm512_shuffle_ps(p[2 * i], p[2 * i + 1], 0xee));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      r[i] =
          _mm512_add_ps(_mm512_shuffle_f32x4(q[2 * i], q[2 * i + 1], 0x88), _mm512_shuffle_f32x4(q[2 * i], q[2 * i + 1], 0xdd));
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(r[0], r[1], 0x88), _mm512_shuffle_f32x4(r[0], r[1], 0xdd));
  }

  // 16 values times a scale, looked up by the low four bits of dwords: `even` by nibble `shift` / 4, `odd` by the one 16 bits
  // on.
  using Table = T;
  static Table table(const float* values, float scale) { return _mm512_mul_ps(load(values), _mm512_set1_ps(scale)); }
  static void look_up(const Table& t, const uint8_t* dwords, int shift, T& even, T& odd) {
    const __m512i w = _mm512_loadu_si512(dwords);
    even = _mm512_permutexvar_ps(_mm512_srli_epi32(w, shift), t);
    odd = _mm512_permutexvar_ps(_mm512_srli_epi32(w, shift + 16), t);
  }
  // even[0], odd[0], even[1], ...
  static void interleave(T even, T odd, T& first, T& second) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    first = _mm512_permutex2var_ps(even, low, odd);
    second = _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd);
  }
  // `count` <= kLanes scales: rounded after the product and after the sum, so the two must not become one operation.
  // One by one: a gather takes longer.
  static void scales(const uint8_t* codes, int count, const float* nested_code, float nested_absmax, float offset, float* out) {
    for (int i = 0; i < count; ++i) {
      float v = nested_code[codes[i]] * nested_absmax;
      asm("" : "+x"(v));
      out[i] = v + offset;
    }
  }

  static U set(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
  static U iota(uint32_t first) {
    return _mm512_add_epi32(set(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  }
  static U exclusive_or(U a, U b, U c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  static void multiply(U a, uint32_t m, U& hi, U& lo) {
    const U by = _mm512_set1_epi64(static_cast<int64_t>(m));
    const U even = _mm512_mul_epu32(a, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), by);
    hi = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
    lo = _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA);
  }
  static uint32_t at_least(U v, uint32_t threshold) {
    return _mm512_cmpge_epu16_mask(v, _mm512_set1_epi16(static_cast<int16_t>(threshold)));
  }
};
