// The product of a strip of the weight's rows with few rows of x, on tile registers: yᵀ = W0 xᵀ. Rows of a weight are a left
// operand as they come (amx.cpp), from memory or decoded; x is packed once as the right one. Included by amx.cpp.
//
// Fetching keeps the vector ports busy about as long as the products keep the tile unit busy: so while one chunk of 128 k is
// multiplied the next one is fetched, some of the rows after each product. With more than one panel of x the fetched block is
// used by all of them in turn, and the two follow one another.

constexpr int kStripRows = 2 * kTileRows;
constexpr int64_t kGroupBytes = kStripRows * kLine;   // a group of 32 k of all rows
constexpr int64_t kChunkOut = kGroups * kGroupBytes;  // a chunk of all rows, decoded
constexpr int64_t kStripBlock = 2 * kChunk;           // with more panels: decoded and used while it is in L1

// Scales of the strip's rows, one per kUnit weights: [row][ceil(K / kUnit) + kLanes].
template <int kUnit>
int64_t strip_scales(const QuantizedWeight& w, int64_t row, int rows, float* out) {
  const int64_t units = w.K / kUnit, stride = units + kLanes;
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(w.blocksize));
  for (int i = 0; i < rows; ++i, out += stride) {
    const int64_t at = (row + i) * w.K, first = at >> shift, last = (at + w.K - 1) >> shift;
    scales_of(w, first, last - first + 1, out);
    if (last - first + 1 == units) continue;
    for (int64_t u = units - 1; u >= 0; --u)
      out[u] = out[((at + u * kUnit) >> shift) - first];  // from behind: never ahead of u
  }
  return stride;
}

// One row of a chunk, kUsed of its groups, kGroupStride bytes apart.
template <int kUnit, int64_t kGroupStride, int kUsed = kGroups>
inline __attribute__((always_inline)) void decode_chunk(const uint8_t* chunk, __m512 values, const float* scale, char* out) {
  const __m512i words = _mm512_loadu_si512(chunk);
  __m512i table = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int j = 0; j < kUsed; ++j) {
    if (j * kGroup % kUnit == 0) {
      const __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(scale[j * kGroup / kUnit]));
      table = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(scaled, scaled));
    }
    _mm512_store_si512(out + j * kGroupStride, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * j), table));
  }
}

// Rows [row, row + rows) of a weight, fetched chunk by chunk; K is a multiple of 32.
struct DenseRows {
  const Matrix& weight;
  int64_t K, row;
  int rows;

  // Rows [first, end) of the chunk at k.
  template <int64_t kGroupStride>
  inline __attribute__((always_inline)) void run(int64_t k, int first, int end, char* out) const {
    const int64_t groups = (K - k) / kGroup < kGroups ? (K - k) / kGroup : kGroups, stride = weight.row_stride * 2;
    const char* from = weight.at(row + first, k);
    out += first * kLine;
    if (end > rows) end = rows;
    for (int i = first; i < end; ++i, from += stride, out += kLine)
      for (int64_t g = 0; g < groups; ++g) {
        __builtin_prefetch(from + g * kLine + 4 * kGroups * kLine, 0, 2);
        _mm512_store_si512(out + g * kGroupStride, _mm512_loadu_si512(from + g * kLine));
      }
  }
};

template <int kUnit>
struct DecodedRows {
  const QuantizedWeight& w;
  int64_t K, row;
  int rows;
  const float* scales;
  int64_t scale_stride;
  __m512 values;

  // Rows [first, end) of the chunk at k.
  template <int64_t kGroupStride>
  inline __attribute__((always_inline)) void run(int64_t k, int first, int end, char* out) const {
    const int64_t bytes = row_bytes(K), left = K - k;
    const uint8_t* codes = w.codes + (row + first) * bytes + k / 2;
    const float* scale = scales + first * scale_stride + k / kUnit;
    out += first * kLine;
    if (end > rows) end = rows;
    for (int i = first; i < end; ++i, codes += bytes, scale += scale_stride, out += kLine) {
      __builtin_prefetch(codes + 4 * kChunkBytes, 0, 3);
      if (left >= kChunk) {
        decode_chunk<kUnit, kGroupStride>(codes, values, scale, out);
        continue;
      }
      uint8_t own[kChunkBytes];
      const uint8_t* chunk = chunk_at(codes, 0, left, own);
      if (left == kGroup) decode_chunk<kUnit, kGroupStride, 1>(chunk, values, scale, out);
      if (left == 2 * kGroup) decode_chunk<kUnit, kGroupStride, 2>(chunk, values, scale, out);
      if (left == 3 * kGroup) decode_chunk<kUnit, kGroupStride, 3>(chunk, values, scale, out);
    }
  }
};

// Products wait long for their operands and their predecessors: so each group's registers are loaded a group early, and
// where there is one vector of x its groups alternate between two accumulators.
template <bool kRight, class Rows>
void strip_one_panel(const Rows& rows, const float* panel, int64_t vector_stride, char* fetched, float* c) {
  const int64_t K = rows.K;
  // Two sides, one written and one read: group by group side by side, so that a load and a store in flight never agree in
  // the last twelve bits of their addresses, which would make the load wait.
  constexpr int64_t kStride = 2 * kGroupBytes;
  static_assert(kStride == 4096);
  const auto load = [&](int64_t k) __attribute__((always_inline)) {  // the group of 32 at k
    if (k >= K) return;
    const char* left = fetched + k / kChunk % 2 * kGroupBytes + k % kChunk / kGroup * kStride;
    const float* right = panel + k / 2 * kLanes;
    _tile_loadd(4, left, kLine);
    _tile_loadd(6, right, kLine);
    _tile_loadd(5, left + kRegister * 4, kLine);
    if (kRight) _tile_loadd(7, right + vector_stride, kLine);
  };
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  rows.template run<kStride>(0, 0, kStripRows, fetched);
  load(0);
  for (int64_t k = 0; k < K; k += kChunk) {
    char* next = fetched + (k / kChunk + 1) % 2 * kGroupBytes;
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      const int64_t at = k + g * kGroup;
      if (at >= K) break;
      if (kRight) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      } else if (g % 2) {
        _tile_dpbf16ps(1, 4, 6);
        _tile_dpbf16ps(3, 5, 6);
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
      }
      if (g < kGroups - 1) load(at + kGroup);
      // Done a product early, so that its stores have arrived when they are read.
      constexpr int kShare = 11;
      static_assert(kShare * (kGroups - 1) >= kStripRows);
      const int first = g * kShare, end = first + kShare < kStripRows ? first + kShare : kStripRows;
      if (k + kChunk < K && g < kGroups - 1) rows.template run<kStride>(k + kChunk, first, end, next);
    }
    load(k + kChunk);
  }
  float* below = c + kTileRows * kPanel;
  _tile_stored(0, c, kRowBytes);
  _tile_stored(2, below, kRowBytes);
  _tile_stored(1, c + kLanes, kRowBytes);
  _tile_stored(3, below + kLanes, kRowBytes);
  if (kRight) return;
  for (int i = 0; i < kStripRows; ++i, c += kPanel) V::store(c, V::add(V::load(c), V::load(c + kLanes)));
}

template <class Rows>
void strip_of(const Rows& rows, const float* x_panels, int64_t vector_stride, int64_t M, float* products, char* fetched) {
  begin();
  if (M <= kPanel) {
    (M > kLanes ? strip_one_panel<true, Rows> : strip_one_panel<false, Rows>)(rows, x_panels, vector_stride, fetched, products);
  } else {
    for (int64_t k0 = 0; k0 < rows.K; k0 += kStripBlock) {
      const int64_t count = rows.K - k0 < kStripBlock ? rows.K - k0 : kStripBlock;
      for (int64_t k = 0; k < count; k += kChunk)
        rows.template run<kGroupBytes>(k0 + k, 0, kStripRows, fetched + k / kGroup * kGroupBytes);
      for (int64_t m = 0; m < M; m += kPanel)
        tile_bf16(kStripRows, M - m > kLanes ? 2 : 1, reinterpret_cast<const float*>(fetched),
                  x_panels + m / kLanes * vector_stride + k0 / 2 * kLanes, vector_stride, count / 2,
                  products + m / kPanel * kStripRows * kPanel, k0 > 0, kNothingAhead);
    }
  }
  end();
}

template <int kUnit>
void strip_decoded(const QuantizedWeight& w, int64_t row, int rows, const float* x_panels, int64_t vector_stride, int64_t M,
                   float* products, char* scratch) {
  float* scales = reinterpret_cast<float*>(scratch + 2 * kChunkOut);
  const int64_t stride = strip_scales<kUnit>(w, row, rows, scales);
  strip_of(DecodedRows<kUnit>{w, w.K, row, rows, scales, stride, V::load(w.values)}, x_panels, vector_stride, M, products,
           scratch);
}

void strip(const Matrix& weight, const QuantizedWeight& quantized, int64_t K, int64_t row, int rows, const float* x_panels,
           int64_t vector_stride, int64_t M, float* products, char* scratch) {
  if (!quantized.codes) return strip_of(DenseRows{weight, K, row, rows}, x_panels, vector_stride, M, products, scratch);
  const bool wide = quantized.blocksize >= 2 * kGroup && K % (2 * kGroup) == 0;
  (wide ? strip_decoded<2 * kGroup> : strip_decoded<kGroup>)(quantized, row, rows, x_panels, vector_stride, M, products,
                                                             scratch);
}

int64_t strip_scratch(int64_t K) {
  return 2 * kChunkOut + kStripRows * (K / kGroup + kLanes) * 4 + kLine;
}
