// The machine's own bounds, for the bench: what these loops reach is 100 %. Written over V like micro.h, which includes this.

// `iterations` x kRows x 2 independent multiply-adds on registers alone.
template <class Op>
float multiply_adds(int64_t iterations) {
  constexpr int kChains = 2 * V::kRows;
  typename V::T acc[kChains], a = V::zero(), b = V::zero();
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) acc[i] = V::zero(), V::pin(acc[i]);  // else equal sums would be one
  for (int64_t n = 0; n < iterations; ++n) {
    V::pin(a), V::pin(b);
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) acc[i] = Op::multiply_add(a, b, acc[i]);
  }
  typename V::T total = V::zero();
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) total = V::add(total, acc[i]);
  float lanes[kLanes];
  V::store(lanes, total);
  return lanes[0];
}

// Reads `count` floats in order.
inline float read_all(const float* p, int64_t count) {
  typename V::T sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  for (int64_t i = 0; i + 4 * kLanes <= count; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] = V::add(sum[j], V::load(p + i + j * kLanes));
  }
  float lanes[kLanes];
  V::store(lanes, V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
  return lanes[0];
}
