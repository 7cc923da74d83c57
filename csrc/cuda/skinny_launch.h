// From what a skinny op is at run time to the kernel compiled for it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "skinny.h"
#include "tile.cuh"

namespace lora_ops {

constexpr int kMaxRanks = 64;  // of one block; more are further blocks

// Whether every row of a matrix starts at a multiple of 16 bytes.
inline bool vectors(const void* data, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size_of(dtype) % 16 == 0;
}

template <typename T>
struct Type {
  using type = T;
};

// call(Type<T>, Type<Adapter>, integral_constant<int, ranks of a block>, bool_constant<vector>)
template <typename Call>
void dispatch(DType x, DType adapter, int64_t r, bool vector, Call call) {
  const auto with_vector = [&](auto t, auto a, auto ranks) {
    vector ? call(t, a, ranks, std::true_type{}) : call(t, a, ranks, std::false_type{});
  };
  const auto with_ranks = [&](auto t, auto a) {
    if (r <= 16) {
      with_vector(t, a, std::integral_constant<int, 16>{});
    } else if (r <= 32) {
      with_vector(t, a, std::integral_constant<int, 32>{});
    } else {
      with_vector(t, a, std::integral_constant<int, kMaxRanks>{});
    }
  };
  const auto with_adapter = [&](auto t) { adapter == DType::f32 ? with_ranks(t, Type<float>{}) : with_ranks(t, t); };
  x == DType::bf16 ? with_adapter(Type<Bf16>{}) : with_adapter(Type<Half>{});
}

}  // namespace lora_ops
