// Micro-kernels that read a 4-bit weight where it lies (nf4.h has the layout), written once over V like the rest of micro.h,
// which includes this.
//
// A chunk's dword i holds words 2 i and 2 i + 1: shifted by 4 j, its low nibble is the code of weight 32 j + 2 i of the chunk,
// and shifted 16 bits further of the one after. So kLanes dwords give the even and the odd ones of kPanel neighbouring
// weights, each by a shift and a look-up in the 16 values. These are multiplied by the block's scale beforehand: once for
// every 32 or 64 weights instead of once for every weight.

constexpr int kGroup = 32;  // weights of a chunk under one nibble: whole blocks are made of them
constexpr int kGroups = kChunk / kGroup;
constexpr int kNested = 256;      // scales under one nested_absmax
constexpr int kScaleSpan = 4096;  // weights of a row whose scales are computed together

// The scales of blocks [first, first + count). `out` has room for kLanes more.
inline void scales_of(const QuantizedWeight& w, int64_t first, int64_t count, float* out) {
  if (!w.nested_code) {
    std::memcpy(out, static_cast<const float*>(w.absmax) + first, count * sizeof(float));
    return;
  }
  const uint8_t* codes = static_cast<const uint8_t*>(w.absmax);
  for (int64_t b = first, end; b < first + count; b = end) {
    end = (b / kNested + 1) * kNested < first + count ? (b / kNested + 1) * kNested : first + count;
    for (int64_t i = b; i < end; i += kLanes) {
      const int here = static_cast<int>(end - i < kLanes ? end - i : kLanes);
      V::scales(codes + i, here, w.nested_code, w.nested_absmax[b / kNested], w.offset, out + (i - first));
    }
  }
}

// The chunk at weight k of a row of K, in `own` if it is a short tail.
inline const uint8_t* chunk_at(const uint8_t* row, int64_t k, int64_t K, uint8_t* own) {
  if (stored_weights(K - k) == kChunk) return row + k / 2;
  for (int w = 0; w < kWords; ++w) own[2 * w] = row[k / 2 + w], own[2 * w + 1] = 0;
  return own;
}

template <DType kType>
void decode_as(const QuantizedWeight& w, int64_t row, int64_t k0, int64_t k, char* out, int64_t group_stride) {
  const uint8_t* codes = w.codes + row * row_bytes(w.K);
  const int64_t at = row * w.K + k0;  // in the flattened weight
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(w.blocksize));
  const int64_t first = at >> shift;
  float scale[kMostDecoded / kGroup + 1 + kLanes];
  scales_of(w, first, ((at + k - 1) >> shift) - first + 1, scale);
  uint8_t own[kChunkBytes];
  for (int64_t c = 0; c < k; c += kChunk) {
    const uint8_t* chunk = chunk_at(codes, k0 + c, w.K, own);
#pragma GCC unroll 4
    for (int j = 0; j < kGroups; ++j, out += group_stride) {
      const int64_t i = c + j * kGroup;
      if (i >= k) break;
      const bool one_scale = w.K % kGroup == 0;
      const auto table = V::table(w.values, one_scale ? scale[((at + i) >> shift) - first] : 1.f);
      alignas(64) float scales[kGroup];
      if (!one_scale) {
        for (int n = 0; n < kGroup; ++n) scales[n] = scale[((i + n < k ? at + i + n : at + k - 1) >> shift) - first];
      }
#pragma GCC unroll 4
      for (int p = 0; p < kGroup; p += kPanel) {
        typename V::T even, odd, a, b;
        V::look_up(table, chunk + 2 * p, 4 * j, even, odd);
        V::interleave(even, odd, a, b);
        if (!one_scale) {
          a = V::mul(a, V::load(scales + p));
          b = V::mul(b, V::load(scales + p + kLanes));
        }
        store_as<kType>(out, p, a);
        store_as<kType>(out, p + kLanes, b);
      }
    }
  }
}

inline void decode(const QuantizedWeight& w, int64_t row, int64_t k0, int64_t k, DType to, char* out, int64_t group_stride) {
  to == DType::bf16 ? decode_as<DType::bf16>(w, row, k0, k, out, group_stride)
                    : decode_as<DType::f32>(w, row, k0, k, out, group_stride);
}

// Whole chunks: beyond the row, zero.
template <class Place>
void ordered_chunks(const Matrix& src, int64_t k, Mask mask, float* out, Place place) {
  ordered(src, k, mask, out, place);
  const int64_t written = (k + kPanel - 1) / kPanel * kPanel, end = (k + kChunk - 1) / kChunk * kChunk;
  std::memset(out + written, 0, (end - written) * sizeof(float));
}

inline void dot_order_codes(const Matrix& src, int64_t k, Mask mask, float* out) {
  ordered_chunks(src, k, mask, out, even_first);
}

// sums[i * kRight + j] += all lanes of left[i] · weight[row + j], for kLeft x kRight = kLanes pairs. kTogether rows of the
// weight at a time: enough chains of multiply-adds to hide their latency.
template <int kLeft, bool kWide>
void dot_codes_rows(const float* left, int64_t left_stride, const QuantizedWeight& w, int64_t row, int cols, int64_t k0,
                    int64_t k, float* c) {
  using T = typename V::T;
  constexpr int kRight = kLanes / kLeft, kTogether = kLeft <= 2 && kRight >= 2 ? 2 : 1, kChains = kLeft <= 4 ? 2 : 1;
  constexpr int kPerTable = kWide ? 2 : 1;
  const int64_t bytes = row_bytes(w.K);
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(w.blocksize));
  alignas(64) float lanes[kLanes];
  T sums[kLanes];
#pragma GCC unroll 16
  for (int a = 0; a < kLanes; ++a) sums[a] = V::zero();
  for (int j0 = 0; j0 < kRight && j0 < cols; j0 += kTogether) {
    T acc[kTogether][kLeft][kChains];
    const uint8_t* codes[kTogether];
    int64_t at[kTogether], first[kTogether];
    float scale[kTogether][kScaleSpan / kGroup + 1 + kLanes];
#pragma GCC unroll 2
    for (int j = 0; j < kTogether; ++j) {
      const int64_t n = row + (j0 + j < cols ? j0 + j : j0);
      codes[j] = w.codes + n * bytes;
      at[j] = n * w.K + k0;
      first[j] = at[j] >> shift;
#pragma GCC unroll 8
      for (int i = 0; i < kLeft; ++i)
#pragma GCC unroll 2
        for (int h = 0; h < kChains; ++h) acc[j][i][h] = V::zero();
    }
    for (int64_t c0 = 0; c0 < k; c0 += kChunk) {
      if (c0 % kScaleSpan == 0) {
        const int64_t count = k - c0 < kScaleSpan ? k - c0 : kScaleSpan;
#pragma GCC unroll 2
        for (int j = 0; j < kTogether; ++j) {
          first[j] = (at[j] + c0) >> shift;
          scales_of(w, first[j], ((at[j] + c0 + count - 1) >> shift) - first[j] + 1, scale[j]);
        }
      }
      uint8_t own[kTogether][kChunkBytes];
      const uint8_t* chunk[kTogether];
#pragma GCC unroll 2
      for (int j = 0; j < kTogether; ++j) {
        chunk[j] = chunk_at(codes[j], k0 + c0, w.K, own[j]);
        __builtin_prefetch(codes[j] + (k0 + c0) / 2 + 2 * kTogether * bytes, 0, 3);  // the rows after these
      }
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; g += kPerTable) {
        if (c0 + g * kGroup >= k) break;
        typename V::Table table[kTogether];
#pragma GCC unroll 2
        for (int j = 0; j < kTogether; ++j) {
          table[j] = V::table(w.values, scale[j][((at[j] + c0 + g * kGroup) >> shift) - first[j]]);
        }
#pragma GCC unroll 2
        for (int h = 0; h < kPerTable; ++h)
#pragma GCC unroll 4
          for (int p = 0; p < kGroup; p += kPanel) {
            const float* x = left + c0 + (g + h) * kGroup + p;
            T even[kTogether], odd[kTogether];
#pragma GCC unroll 2
            for (int j = 0; j < kTogether; ++j) V::look_up(table[j], chunk[j] + 2 * p, 4 * (g + h), even[j], odd[j]);
#pragma GCC unroll 8
            for (int i = 0; i < kLeft; ++i) {
              const T x0 = V::load(x + i * left_stride), x1 = V::load(x + i * left_stride + kLanes);
#pragma GCC unroll 2
              for (int j = 0; j < kTogether; ++j) {
                acc[j][i][0] = V::fma(x0, even[j], acc[j][i][0]);
                acc[j][i][kChains - 1] = V::fma(x1, odd[j], acc[j][i][kChains - 1]);
              }
            }
          }
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < kTogether; ++j)
#pragma GCC unroll 8
      for (int i = 0; i < kLeft; ++i) {
        sums[i * kRight + j0 + j] = kChains == 2 ? V::add(acc[j][i][0], acc[j][i][kChains - 1]) : acc[j][i][0];
      }
  }
  V::store(lanes, V::sums(sums));
  for (int i = 0; i < kLeft; ++i)
    for (int j = 0; j < kRight && j < cols; ++j) c[i * kPanel + j] += lanes[i * kRight + j];
}

// Left rows are taken in powers of two: `left` holds that many.
template <int kLeft = 1>
void dot_codes_as(int rows, const float* left, int64_t left_stride, const QuantizedWeight& w, int64_t row, int cols, int64_t k0,
                  int64_t k, float* c) {
  if constexpr (kLeft <= kLanes && kLeft <= kDotRows) {
    if (rows > kLeft) return dot_codes_as<2 * kLeft>(rows, left, left_stride, w, row, cols, k0, k, c);
    constexpr int kRight = kLanes / kLeft;
    const bool wide = w.blocksize >= 2 * kGroup && w.K % (2 * kGroup) == 0;
    for (int j = 0; j < cols; j += kRight) {
      wide ? dot_codes_rows<kLeft, true>(left, left_stride, w, row + j, cols - j, k0, k, c + j)
           : dot_codes_rows<kLeft, false>(left, left_stride, w, row + j, cols - j, k0, k, c + j);
    }
  }
}

inline void dot_codes(int rows, const float* left, int64_t left_stride, const QuantizedWeight& w, int64_t row, int cols,
                      int64_t k0, int64_t k, float* c) {
  dot_codes_as(rows, left, left_stride, w, row, cols, k0, k, c);
}
