// Few rows of x in bf16 with vdpbf16ps: `dot` and `dot_codes` (micro.h, four_bit.h) without widening x. Included after pairs.h
// inside a `#pragma GCC target` region and namespace, so without guard.
//
// x lies as it is, row by row, zero-padded to whole chunks. A dense weight's rows are loaded as they are, too. Of 4-bit
// weights, a chunk's words shifted by 4 j look up 32 neighbouring weights at once among 16 values in bf16, which lie there
// twice: the fifth bit of an index is another code's. For one or two rows of x these are the code's values, and the fp32 sum
// of a block's products is scaled; for more, values times scale, rounded once, since then no sum needs scaling.

constexpr int kPairRow = 32;  // weights of a vector in bf16
static_assert(kPairRow == kGroup, "a vector of x meets a vector of decoded weights");

// Rows in bf16 at half the stride that is given in floats: the other half is not used.
inline const uint16_t* pair_row(const float* left, int64_t left_stride, int i) {
  return reinterpret_cast<const uint16_t*>(left + i * left_stride);
}

inline __m512bh load_pairs(const void* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}

inline void order_pairs(const Matrix& src, int64_t k, Mask, float* out) {
  uint16_t* to = reinterpret_cast<uint16_t*>(out);
  std::memcpy(to, src.at(0, 0), k * 2);
  std::memset(to + k, 0, ((k + kChunk - 1) / kChunk * kChunk - k) * 2);
}

// c[i][j] += left[i] · right[j] for kLeft x kRight pairs, at most kLanes
template <int kLeft, int kRight>
void dot_pairs_rows(const float* left, int64_t left_stride, const Matrix& right, int64_t k, float* c) {
  __m512 acc[kLanes];
#pragma GCC unroll 16
  for (int a = 0; a < kLanes; ++a) acc[a] = V::zero();
  const int64_t stride = right.row_stride * 2;
  const char* row = right.at(0, 0);
  const auto step = [&](const __m512bh* w, int64_t k0) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < kLeft; ++i) {
      const __m512bh x = load_pairs(pair_row(left, left_stride, i) + k0);
#pragma GCC unroll 16
      for (int j = 0; j < kRight; ++j) acc[i * kRight + j] = _mm512_dpbf16_ps(acc[i * kRight + j], x, w[j]);
    }
  };
  int64_t k0 = 0;
  for (; k0 + kPairRow <= k; k0 += kPairRow) {
    __m512bh w[kRight];
#pragma GCC unroll 16
    for (int j = 0; j < kRight; ++j) {
      const char* from = row + j * stride + k0 * 2;
      __builtin_prefetch(from + kRight * stride, 0, 2);  // the rows that come next
      w[j] = load_pairs(from);
    }
    step(w, k0);
  }
  if (k0 < k) {
    const __mmask32 have = (1u << (k - k0)) - 1;
    __m512bh w[kRight];
#pragma GCC unroll 16
    for (int j = 0; j < kRight; ++j) {
      w[j] = reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(have, row + j * stride + k0 * 2));
    }
    step(w, k0);
  }
  alignas(64) float sums[kLanes];
  V::store(sums, V::sums(acc));
#pragma GCC unroll 8
  for (int i = 0; i < kLeft; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < kRight; ++j) c[i * kPanel + j] += sums[i * kRight + j];
}

// One row of x: the weight's rows one after the other, a single stream, which is what the hardware fetches best; its
// prefetchers stop at the end of a page, hence pages ahead: four, fewer would be too late.
inline void dot_pairs_one(const float* left, const Matrix& right, int cols, int64_t k, float* c, const char* next) {
  constexpr int kChains = 4, kPages = 4 * 4096;
  const char* const end = right.at(cols, 0);
  const uint16_t* x = pair_row(left, 0, 0);
  for (int j0 = 0; j0 < cols; j0 += kLanes) {
    __m512 sums[kLanes];
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) sums[j] = V::zero();
    for (int j = 0; j < kLanes && j0 + j < cols; ++j) {
      const char* row = right.at(j0 + j, 0);
      const char* ahead = row + kPages;
      if (next && ahead >= end) ahead = next + (ahead - end);
      __m512 acc[kChains];
#pragma GCC unroll 4
      for (int h = 0; h < kChains; ++h) acc[h] = V::zero();
      int64_t k0 = 0;
      for (; k0 + kChains * kPairRow <= k; k0 += kChains * kPairRow) {
#pragma GCC unroll 4
        for (int h = 0; h < kChains; ++h) {
          const int64_t at = k0 + h * kPairRow;
          __builtin_prefetch(ahead + at * 2, 0, 3);
          acc[h] = _mm512_dpbf16_ps(acc[h], load_pairs(x + at), load_pairs(row + at * 2));
        }
      }
      for (; k0 < k; k0 += kPairRow) {
        const __mmask32 have = k - k0 < kPairRow ? (1u << (k - k0)) - 1 : ~0u;
        const auto w = reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(have, row + k0 * 2));
        acc[0] = _mm512_dpbf16_ps(acc[0], load_pairs(x + k0), w);
      }
      sums[j] = V::add(V::add(acc[0], acc[1]), V::add(acc[2], acc[3]));
    }
    alignas(64) float of_rows[kLanes];
    V::store(of_rows, V::sums(sums));
    for (int j = 0; j < kLanes && j0 + j < cols; ++j) c[j0 + j] += of_rows[j];
  }
}

// Left rows are taken in powers of two: `left` holds that many.
template <int kLeft = 2>
void dot_pairs_as(int rows, const float* left, int64_t left_stride, const Matrix& right, int cols, int64_t k, float* c) {
  if constexpr (kLeft <= kDotRows) {
    if (rows > kLeft) return dot_pairs_as<2 * kLeft>(rows, left, left_stride, right, cols, k, c);
    constexpr int kRight = kLeft == 2 ? 4 : kLanes / kLeft;
    int j = 0;
    Matrix rows_of = right;
    for (; j + kRight <= cols; j += kRight) {
      rows_of.data = right.at(j, 0);
      dot_pairs_rows<kLeft, kRight>(left, left_stride, rows_of, k, c + j);
    }
    for (; j < cols; ++j) {
      rows_of.data = right.at(j, 0);
      dot_pairs_rows<kLeft, 1>(left, left_stride, rows_of, k, c + j);
    }
  }
}

inline void dot_pairs(int rows, const float* left, int64_t left_stride, const Matrix& right, int cols, int64_t k, float* c,
                      const char* next) {
  if (rows == 1) return dot_pairs_one(left, right, cols, k, c, next);
  dot_pairs_as(rows, left, left_stride, right, cols, k, c);
}

// A row of 16 in fp32 as three of bf16 whose sum it is, cut off and not rounded, so that none overflows: each twice, for two
// right rows in a vector. What is not finite has the first one alone.
inline void three_terms(const float* left, __m512bh terms[3]) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  __m512 rest = V::load(left);
  const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_sub_ps(rest, rest), V::zero(), _CMP_EQ_OQ);
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const __m512i term = _mm512_and_si512(_mm512_castps_si512(rest), upper);
    const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(term, 16));
    terms[i] = reinterpret_cast<__m512bh>(_mm512_broadcast_i64x4(narrow));
    rest = _mm512_maskz_sub_ps(finite, rest, _mm512_castsi512_ps(term));
  }
}

inline __m512 add_shuffled(__m512 a, __m512 b) {
  return V::add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

// dot_short of 16 k that lie side by side, without widening them: a vector holds two rows.
inline void dot_short_pairs(const float* left, const Matrix& right, int cols, int64_t k, float* c, int64_t ahead) {
  constexpr int64_t kRow = 16;
  if (right.dtype != DType::bf16 || k != kRow || right.row_stride != kRow || cols % kLanes) {
    return dot_short(left, right, cols, k, c, ahead);
  }
  __m512bh terms[3];
  three_terms(left, terms);
  const __m512i in_turn = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  for (int j = 0; j < cols; j += kLanes) {
    const char* rows = right.at(j, 0);
    __m512 two[8], four[4], eight[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      __builtin_prefetch(rows + i * kLanes * 4 + ahead, 0, 3);
      const __m512bh weights = load_pairs(rows + i * kLanes * 4);
      two[i] = V::zero();
#pragma GCC unroll 3
      for (int t = 2; t >= 0; --t) two[i] = _mm512_dpbf16_ps(two[i], weights, terms[t]);
    }
    // Sums of neighbours, of those, and of quarters of vectors.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) four[i] = add_shuffled(two[2 * i], two[2 * i + 1]);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) eight[i] = add_shuffled(four[2 * i], four[2 * i + 1]);
    const __m512 sums = V::add(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88), _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
    V::store(c + j, _mm512_permutexvar_ps(in_turn, sums));
  }
}

// The 16 values in bf16, times a scale.
inline __m512i pair_table(__m512 values, float scale) {
  const __m512 scaled = V::mul(values, _mm512_set1_ps(scale));
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(scaled, scaled));
}

// The scales that codes can have under one nested_absmax: looking one up is cheaper than computing it.
struct NestedScales {
  int64_t group = -1;
  alignas(64) float of[kNested];

  const float* in(const QuantizedWeight& w, int64_t g) {
    if (g != group) {
      group = g;
      for (int i = 0; i < kNested; i += kLanes) {
        __m512 v = V::mul(V::load(w.nested_code + i), _mm512_set1_ps(w.nested_absmax[g]));
        V::pin(v);  // rounded after the product and after the sum, as everywhere
        V::store(of + i, V::add(v, _mm512_set1_ps(w.offset)));
      }
    }
    return of;
  }
};

// Of a row's groups: one to a block, two or more, or two in a row of whole chunks, where a block's scale is found the fastest.
enum class Blocks { one, wide, chunks };

constexpr int64_t kCodesAhead = 8192;  // bytes that codes are fetched ahead, or kRight rows

// c[i][j] += left[i] · weight[row + j] over [k0, k0 + k) for kLeft x kRight pairs, at most kLanes. The scale of block b,
// counted from the first one of the row that is used, is scales[j][nested ? nested[j][b] : b].
template <int kLeft, int kRight, Blocks kBlocks, bool kNestedOnce>
void dot_code_pairs_rows(const float* left, int64_t left_stride, const QuantizedWeight& w, int64_t row, int64_t k0, int64_t k,
                         NestedScales& of_codes, float* c) {
  constexpr bool kScaledSums = kLeft <= 2;
  constexpr int kPerBlock = kBlocks == Blocks::one ? 1 : 2;
  const int64_t bytes = row_bytes(w.K);
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(w.blocksize));
  const int64_t ahead = kRight * bytes > kCodesAhead ? kRight * bytes : kCodesAhead;
  const __m512 values = V::load(w.values);
  const __m512i plain = pair_table(values, 1.f);
  __m512 acc[kLanes];
#pragma GCC unroll 16
  for (int a = 0; a < kLanes; ++a) acc[a] = V::zero();
  for (int64_t s = 0; s < k; s += kScaleSpan) {
    const int64_t count = k - s < kScaleSpan ? k - s : kScaleSpan;
    float computed[kNestedOnce ? 1 : kRight][kScaleSpan / kGroup + kGroups + 1 + kLanes];
    const float* scales[kRight];
    const uint8_t* nested[kRight] = {};
    int64_t at[kRight];    // of the span's first weight, in the row's blocks
    int64_t last[kRight];  // block of the row
#pragma GCC unroll 4
    for (int j = 0; j < kRight; ++j) {
      const int64_t flat = (row + j) * w.K + k0 + s, first = flat >> shift;
      at[j] = flat - (first << shift);
      const int64_t blocks = ((flat + count - 1) >> shift) - first + 1;
      last[j] = blocks - 1;
      if constexpr (kNestedOnce) {
        scales[j] = of_codes.in(w, first / kNested);
        nested[j] = static_cast<const uint8_t*>(w.absmax) + first;
      } else {
        scales_of(w, first, blocks, computed[j]);
        for (int g = 0; g <= kGroups; ++g) computed[j][blocks + g] = 0.f;
        scales[j] = computed[j];
      }
    }
    // Of group g of the chunk at c. Beyond the row x is zero: any scale will do.
    const auto scale_of = [&](int j, int64_t c, int g) __attribute__((always_inline)) {
      int64_t block = kBlocks == Blocks::chunks ? c / (2 * kGroup) + g / 2 : (at[j] + c + g * kGroup) >> shift;
      if (kBlocks != Blocks::chunks && kNestedOnce && block > last[j]) block = last[j];
      return scales[j] + (kNestedOnce ? nested[j][block] : block);
    };
    __m512i table[2][kRight];  // of a block and of the next: made while the one before is multiplied, or those products wait
#pragma GCC unroll 4
    for (int j = 0; j < kRight; ++j) table[0][j] = table[1][j] = kScaledSums ? plain : pair_table(values, *scale_of(j, 0, 0));
    for (int64_t c0 = 0; c0 < count; c0 += kChunk) {
      const int64_t next = c0 + kChunk < count ? c0 + kChunk : 0;
      const bool whole = kBlocks == Blocks::chunks || stored_weights(w.K - (k0 + s + c0)) == kChunk;
      alignas(64) uint8_t own[kRight][kChunkBytes];  // of short tails
      const uint8_t* chunk[kRight];
      __m512i words[kRight];
#pragma GCC unroll 4
      for (int j = 0; j < kRight; ++j) {
        chunk[j] = w.codes + (row + j) * bytes + (k0 + s + c0) / 2;
        __builtin_prefetch(chunk[j] + ahead, 0, 3);
        if (whole) {
          words[j] = _mm512_loadu_si512(chunk[j]);
        } else {
          words[j] = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(chunk[j])));
          _mm512_store_si512(own[j], words[j]);
          chunk[j] = own[j];
        }
      }
#pragma GCC unroll 4
      for (int b = 0; b < kGroups; b += kPerBlock) {
        if (b >= kGroups / 2 && !whole) break;
        const int now = b / kPerBlock % 2;
        __m512 sum[kLeft][kRight];
#pragma GCC unroll 2
        for (int g = b; g < b + kPerBlock; ++g) {
          __m512bh weights[kRight];
#pragma GCC unroll 4
          for (int j = 0; j < kRight; ++j) {
            const __m512i codes = _mm512_srli_epi16(kScaledSums ? words[j] : _mm512_loadu_si512(chunk[j]), 4 * g);
            weights[j] = reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(codes, table[now][j]));
          }
          if (!kScaledSums && g == b) {
#pragma GCC unroll 4
            for (int j = 0; j < kRight; ++j) {
              const int after = (b + kPerBlock) % kGroups;
              table[1 - now][j] = pair_table(values, *scale_of(j, after ? c0 : next, after));
              asm volatile("" : "+v"(table[1 - now][j]));  // here, not where it is used
            }
          }
#pragma GCC unroll 8
          for (int i = 0; i < kLeft; ++i) {
            const __m512bh x = load_pairs(pair_row(left, left_stride, i) + s + c0 + g * kGroup);
#pragma GCC unroll 4
            for (int j = 0; j < kRight; ++j) {
              __m512& to = kScaledSums ? sum[i][j] : acc[i * kRight + j];
              to = _mm512_dpbf16_ps(kScaledSums && g == b ? V::zero() : to, x, weights[j]);
            }
          }
        }
        if (!kScaledSums) continue;
#pragma GCC unroll 4
        for (int j = 0; j < kRight; ++j) {
          const __m512 by = _mm512_set1_ps(*scale_of(j, c0, b));
#pragma GCC unroll 8
          for (int i = 0; i < kLeft; ++i) acc[i * kRight + j] = V::fma(sum[i][j], by, acc[i * kRight + j]);
        }
      }
    }
  }
  alignas(64) float sums[kLanes];
  V::store(sums, V::sums(acc));
#pragma GCC unroll 8
  for (int i = 0; i < kLeft; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kRight; ++j) c[i * kPanel + j] += sums[i * kRight + j];
}

template <Blocks kBlocks, int kLeft = 1>
void dot_code_pairs_as(int rows, const float* left, int64_t left_stride, const QuantizedWeight& w, int64_t row, int cols,
                       int64_t k0, int64_t k, float* c) {
  if constexpr (kLeft <= kDotRows) {
    if (rows > kLeft) return dot_code_pairs_as<kBlocks, 2 * kLeft>(rows, left, left_stride, w, row, cols, k0, k, c);
    constexpr int kRight = kLeft == 8 ? 2 : 4;
    NestedScales scales;
    const int shift = __builtin_ctzll(static_cast<unsigned long long>(w.blocksize) * kNested);
    const auto group_of = [&](int64_t n, int64_t at) { return (n * w.K + at) >> shift; };
    int j = 0;
    for (; j + kRight <= cols; j += kRight) {
      const int64_t first = row + j, last = first + kRight - 1;
      const bool once = w.nested_code && group_of(first, k0) == group_of(last, k0 + k - 1);
      const auto of =
          once ? dot_code_pairs_rows<kLeft, kRight, kBlocks, true> : dot_code_pairs_rows<kLeft, kRight, kBlocks, false>;
      of(left, left_stride, w, first, k0, k, scales, c + j);
    }
    for (; j < cols; ++j) dot_code_pairs_rows<kLeft, 1, kBlocks, false>(left, left_stride, w, row + j, k0, k, scales, c + j);
  }
}

inline void dot_code_pairs(int rows, const float* left, int64_t left_stride, const QuantizedWeight& w, int64_t row, int cols,
                           int64_t k0, int64_t k, float* c) {
  const bool wide = w.blocksize >= 2 * kGroup && w.K % (2 * kGroup) == 0;
  const bool chunks = w.blocksize == 2 * kGroup && w.K % kChunk == 0;
  (chunks ? dot_code_pairs_as<Blocks::chunks>
   : wide ? dot_code_pairs_as<Blocks::wide>
          : dot_code_pairs_as<Blocks::one>)(rows, left, left_stride, w, row, cols, k0, k, c);
}

constexpr Kernels with_pair_dots(Kernels kernels) {
  kernels.dot_short = dot_short_pairs;
  kernels.pairs = {dot_pairs, order_pairs};
  kernels.codes_bf16 = {dot_code_pairs, order_pairs, sizeof(uint16_t)};
  kernels.few_rows_bf16 = {24, 12, 24, 24};
  return kernels;
}
