// AVX-512 with vdpbf16ps: the same tiles, two neighbouring k per step where both operands are bf16.
//
// A dword of a packed operand holds elements k and k + 1; an odd last k is paired with zero. Dispatch prefers this table
// only where the instruction outruns two fp32 multiply-adds (AMD Zen 4 and later; not Intel's server cores).
#include <immintrin.h>

#include <cstring>

#include "../nf4.h"
#include "../philox.h"
#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,bmi2")

namespace lora_ops {
namespace avx512_bf16 {
#include "avx512.h"
#include "micro.h"
#include "transposed_codes.h"

#include "pair_dots.h"
#include "pairs.h"

struct Bf16Pairs {
  static __m512 multiply_add(__m512 a, __m512 b, __m512 c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

}  // namespace avx512_bf16

const Kernels kAvx512Bf16 = avx512_bf16::with_pair_dots(avx512_bf16::with_pairs(
    avx512_bf16::with_decode_transposed(avx512_bf16::table("avx512_bf16", {avx512_bf16::V::kRows,
                                                                           2,
                                                                           1,
                                                                           {},
                                                                           nullptr,
                                                                           nullptr,
                                                                           avx512_bf16::pack_pairs_transposed<1>,
                                                                           avx512_bf16::pack_pairs_transposed<1>,
                                                                           avx512_bf16::pack_pairs_straight<1>,
                                                                           avx512_bf16::tile<avx512_bf16::Bf16Pairs>,
                                                                           avx512_bf16::tile_with_tail<avx512_bf16::Bf16Pairs>,
                                                                           avx512_bf16::multiply_adds<avx512_bf16::Bf16Pairs>,
                                                                           avx512_bf16::widen_pairs}))));

}  // namespace lora_ops

#pragma GCC pop_options
