// decode (four_bit.h) and pack_transposed in one: codes are transposed, which are a fraction of the weights. Included after
// micro.h inside a `#pragma GCC target` region and namespace of 16 lanes, so without guard.
//
// A dword of codes holds words 2 d and 2 d + 1 of a row's chunk: transposed, vector d holds them of all rows, and shifted by 4
// j it looks up weights 32 j + 2 d and, 16 bits on, 32 j + 2 d + 1. Every lane, a row, has a scale of its own.

static_assert(kLanes * 4 == kChunkBytes, "a chunk has a dword for every vector");

// Weights k, `even`, and k + 1, `odd`, of every row, as fp32's pack_transposed has them.
struct Widened {
  static constexpr int kFloats = 2 * kLanes;
  static void store(float* out, __m512 even, __m512 odd) {
    V::store(out, even);
    V::store(out + kLanes, odd);
  }
};

template <class Kept>
void decode_transposed(const QuantizedWeight& w, int64_t row, int rows, int64_t k0, int64_t k, float* out) {
  const int64_t bytes = row_bytes(w.K);
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(w.blocksize));
  alignas(64) float scale[kMostDecoded / kGroup][kLanes] = {};  // of a group's weights, for every row
  for (int i = 0; i < rows; ++i) {
    const int64_t at = (row + i) * w.K + k0, first = at >> shift;
    float of_blocks[kMostDecoded / kGroup + 1 + kLanes];
    scales_of(w, first, ((at + k - 1) >> shift) - first + 1, of_blocks);
    for (int64_t g = 0; g * kGroup < k; ++g) scale[g][i] = of_blocks[((at + g * kGroup) >> shift) - first];
  }
  const auto values = V::load(w.values);
  for (int64_t c = 0; c < k; c += kChunk) {
    const uint8_t* chunk = w.codes + row * bytes + (k0 + c) / 2;
    typename V::T dwords[kLanes];
    if (rows == kLanes && stored_weights(w.K - (k0 + c)) == kChunk) {
      for (int i = 0; i < kLanes; ++i) __builtin_prefetch(chunk + i * bytes + kMostDecoded / 2, 0, 3);
      V::load_transposed(reinterpret_cast<const char*>(chunk), bytes, dwords);
    } else {
      alignas(64) uint8_t own[kLanes][kChunkBytes] = {};
      for (int i = 0; i < rows; ++i) {
        uint8_t tail[kChunkBytes];
        std::memcpy(own[i], chunk_at(w.codes + (row + i) * bytes, k0 + c, w.K, tail), kChunkBytes);
      }
      V::load_transposed(reinterpret_cast<const char*>(own), kChunkBytes, dwords);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kGroups; ++j) {
      if (c + j * kGroup >= k) break;
      const auto by = V::load(scale[c / kGroup + j]);
      const auto decoded = [&](__m512i codes) { return V::mul(_mm512_permutexvar_ps(codes, values), by); };
#pragma GCC unroll 16
      for (int d = 0; d < kLanes; ++d, out += Kept::kFloats) {
        const __m512i codes = _mm512_castps_si512(dwords[d]);
        Kept::store(out, decoded(_mm512_srli_epi32(codes, 4 * j)), decoded(_mm512_srli_epi32(codes, 4 * j + 16)));
      }
    }
  }
}

constexpr Kernels with_decode_transposed(Kernels kernels) {
  kernels.f32.decode_transposed = decode_transposed<Widened>;
  return kernels;
}
