// Few rows: the right operand is used once, so it is read where it lies. Included by micro.h inside its namespace, so without
// guard.

// Two vectors of 2·kLanes neighbouring elements. bf16 splits into even and odd ones (a shift and an and, no shuffle), hence
// the order of `dot_order`.
template <DType kType>
void load_two(const void* row, int64_t k, typename V::T& a, typename V::T& b) {
  if constexpr (kType == DType::bf16 && V::kPairs) {
    V::split(V::load(reinterpret_cast<const float*>(static_cast<const uint16_t*>(row) + k)), a, b);
  } else {
    a = load_as<kType>(row, k);
    b = load_as<kType>(row, k + kLanes);
  }
}

// A row widened, of every kPanel neighbours i at place(i).
template <class Place>
void ordered(const Matrix& src, int64_t k, Mask mask, float* out, Place place) {
  for (int64_t k0 = 0; k0 < k; k0 += kPanel) {
    const int cols = static_cast<int>(k - k0 < kPanel ? k - k0 : kPanel);
    alignas(64) float v[kPanel];
    widen_row(Matrix{src.at(0, k0), 0, 1, src.dtype}, cols, Mask{mask.words, 0, mask.first + k0}, v);
    for (int i = 0; i < kPanel; ++i) out[k0 + place(i)] = v[i];
  }
}

inline int even_first(int i) {
  return i / 2 + i % 2 * kLanes;
}

inline void dot_order(const Matrix& src, int64_t k, Mask mask, DType right, float* out) {
  right == DType::bf16&& V::kPairs ? ordered(src, k, mask, out, even_first)
                                   : ordered(src, k, mask, out, [](int i) { return i; });
}

// kLeft x kRight sums, kLanes of them wherever kRight is kLanes / kLeft: then one transposing tree adds up all their lanes.
template <DType kType, int kLeft, int kRight>
void dot_rows(const float* left, int64_t left_stride, const Matrix& right, int64_t k, float* c) {
  using T = typename V::T;
  constexpr int kChains = 2 * kLeft * kRight <= kLanes ? 2 : 1;  // independent sums, while there are registers
  T acc[kChains][kLanes];
#pragma GCC unroll 2
  for (int h = 0; h < kChains; ++h)
#pragma GCC unroll 16
    for (int a = 0; a < kLanes; ++a) acc[h][a] = V::zero();
  const char* row = right.at(0, 0);
  const int64_t stride = right.row_stride * size_of(kType);

  const auto step = [&](const char* from, int64_t from_stride, int64_t k0) __attribute__((always_inline)) {
    T a[kRight], b[kRight];
#pragma GCC unroll 16
    for (int j = 0; j < kRight; ++j) {
      load_two<kType>(from + j * from_stride, 0, a[j], b[j]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLeft; ++i) {
      T x0 = V::load(left + i * left_stride + k0), x1 = V::load(left + i * left_stride + k0 + kLanes);
      if (kRight > 1) V::pin(x0), V::pin(x1);  // one load for kRight multiply-adds, not one each
#pragma GCC unroll 16
      for (int j = 0; j < kRight; ++j) {
        T& first = acc[0][i * kRight + j];
        T& second = acc[kChains - 1][i * kRight + j];
        first = V::fma(x0, a[j], first);
        second = V::fma(x1, b[j], second);
      }
    }
  };
  int64_t k0 = 0;
  for (; k0 + kPanel <= k; k0 += kPanel) {
    const char* from = row + k0 * size_of(kType);
    // The rows that come next. Intel's cores fetch kRight streams best by themselves while there are few left rows.
    if constexpr (kLeft >= V::kFetchedFrom) {
#pragma GCC unroll 16
      for (int j = 0; j < kRight; ++j) __builtin_prefetch(from + (kRight + j) * stride, 0, 2);
    }
    step(from, stride, k0);
  }
  if (k0 < k) {
    alignas(64) char part[kRight][kPanel * 4] = {};
    for (int j = 0; j < kRight; ++j) std::memcpy(part[j], row + j * stride + k0 * size_of(kType), (k - k0) * size_of(kType));
    step(part[0], sizeof part[0], k0);
  }
  alignas(64) float sums[kLanes];
  if (kChains == 2) {
#pragma GCC unroll 16
    for (int a = 0; a < kLeft * kRight; ++a) acc[0][a] = V::add(acc[0][a], acc[kChains - 1][a]);
  }
  V::store(sums, V::sums(acc[0]));
#pragma GCC unroll 16
  for (int i = 0; i < kLeft; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < kRight; ++j) c[i * kPanel + j] += sums[i * kRight + j];
}

template <DType kType, int kLeft>
void dot_left(const float* left, int64_t left_stride, const Matrix& right, int cols, int64_t k, float* c) {
  constexpr int kRight = kLeft == 1 ? 2 : kLanes / kLeft;
  int j = 0;
  Matrix rows = right;
  for (; j + kRight <= cols; j += kRight) {
    rows.data = right.at(j, 0);
    dot_rows<kType, kLeft, kRight>(left, left_stride, rows, k, c + j);
  }
  for (; j < cols; ++j) {
    rows.data = right.at(j, 0);
    dot_rows<kType, kLeft, 1>(left, left_stride, rows, k, c + j);
  }
}

// Left rows are taken in powers of two: `left` holds that many.
template <DType kType, int kLeft = 1>
void dot_as(int rows, const float* left, int64_t left_stride, const Matrix& right, int cols, int64_t k, float* c) {
  if constexpr (kLeft <= kLanes && kLeft <= kDotRows) {
    if (rows <= kLeft) return dot_left<kType, kLeft>(left, left_stride, right, cols, k, c);
    dot_as<kType, 2 * kLeft>(rows, left, left_stride, right, cols, k, c);
  }
}

inline void dot(int rows, const float* left, int64_t left_stride, const Matrix& right, int cols, int64_t k, float* c) {
  LORA_OPS_BY_DTYPE(right.dtype, dot_as, rows, left, left_stride, right, cols, k, c)
}

// c = left · right[j] for `rows` <= kLanes right rows, all of them and whole vectors of k if kWhole.
template <DType kType, bool kWhole>
void dot_short_rows(const float* left, const char* row, int64_t stride, int rows, int64_t k, float* c, int64_t ahead) {
  typename V::T acc[kLanes];
#pragma GCC unroll 16
  for (int a = 0; a < kLanes; ++a) acc[a] = V::zero();
  for (int64_t k0 = 0; k0 < k; k0 += kLanes) {
    const auto x = V::load(left + k0);
    for (int a = 0; a < rows; ++a) __builtin_prefetch(row + a * stride + k0 * size_of(kType) + ahead, 0, 2);
    if constexpr (kWhole) {
#pragma GCC unroll 16
      for (int a = 0; a < kLanes; ++a) acc[a] = V::fma(x, load_as<kType>(row + a * stride, k0), acc[a]);
    } else {
      const int64_t count = k - k0 < kLanes ? k - k0 : kLanes;
      for (int a = 0; a < rows; ++a) acc[a] = V::fma(x, load_part<kType>(row + a * stride, k0, count), acc[a]);
    }
  }
  V::store(c, V::sums(acc));
}

// c[j] = left · right[j] for one left row, in order and zero-padded to whole vectors, and `cols` <= kPanel short right rows.
template <DType kType>
void dot_short_as(const float* left, const Matrix& right, int cols, int64_t k, float* c, int64_t ahead) {
  const int64_t stride = right.row_stride * size_of(kType);
  for (int j = 0; j < cols; j += kLanes) {
    const char* row = right.at(j, 0);
    const bool whole = cols - j >= kLanes && k % kLanes == 0;
    const int rows = cols - j < kLanes ? cols - j : kLanes;
    (whole ? dot_short_rows<kType, true> : dot_short_rows<kType, false>)(left, row, stride, rows, k, c + j, ahead);
  }
}

inline void dot_short(const float* left, const Matrix& right, int cols, int64_t k, float* c, int64_t ahead) {
  LORA_OPS_BY_DTYPE(right.dtype, dot_short_as, left, right, cols, k, c, ahead)
}
