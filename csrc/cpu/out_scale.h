// What an output scale and its gradient need. Written over V like micro.h, which includes this.

inline void scale_tile(float* c, int rows, const float* scale) {
  for (int i = 0; i < rows; ++i, c += kPanel)
    for (int j = 0; j < kPanel; j += kLanes) V::store(c + j, V::mul(V::load(c + j), V::load(scale + j)));
}

template <DType kType>
typename V::T load_up_to(const Matrix& m, int64_t row, int64_t col, int64_t count) {
  return count >= kLanes ? load_as<kType>(m.at(row, col), 0) : load_part<kType>(m.at(row, col), 0, count);
}

template <DType kType, DType kOut>
void scale_row_to(const Matrix& row, int64_t cols, const float* scale, const Matrix& out) {
  for (int64_t j = 0; j < cols; j += kLanes) {
    const int64_t count = cols - j;
    const auto v = V::mul(load_up_to<kType>(row, 0, j, count), V::load(scale + j));
    alignas(64) char part[kLanes * 4];
    store_as<kOut>(count >= kLanes ? out.at(0, j) : part, 0, v);
    if (count < kLanes) std::memcpy(out.at(0, j), part, count * size_of(kOut));
  }
}

template <DType kType>
void scale_row_as(const Matrix& row, int64_t cols, const float* scale, const Matrix& out) {
  out.dtype == DType::f32 ? scale_row_to<kType, DType::f32>(row, cols, scale, out)
                          : scale_row_to<kType, kType>(row, cols, scale, out);
}

inline void scale_row(const Matrix& row, int64_t cols, const float* scale, const Matrix& out) {
  LORA_OPS_BY_DTYPE(row.dtype, scale_row_as, row, cols, scale, out)
}

template <DType kA, DType kB>
void column_dots_of(const Matrix& a, const Matrix& b, int64_t rows, int64_t cols, float* sums) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; j += kLanes) {
      const auto x = load_up_to<kA>(a, i, j, cols - j), y = load_up_to<kB>(b, i, j, cols - j);
      V::store(sums + j, V::fma(x, y, V::load(sums + j)));
    }
}

template <DType kType>
void column_dots_as(const Matrix& a, const Matrix& b, int64_t rows, int64_t cols, float* sums) {
  b.dtype == DType::f32 ? column_dots_of<kType, DType::f32>(a, b, rows, cols, sums)
                        : column_dots_of<kType, kType>(a, b, rows, cols, sums);
}

inline void column_dots(const Matrix& a, const Matrix& b, int64_t rows, int64_t cols, float* sums) {
  LORA_OPS_BY_DTYPE(a.dtype, column_dots_as, a, b, rows, cols, sums)
}
