// AVX-512 (F, BW, DQ, VL): fp32 arithmetic, 14 x 32 tiles. bf16 and fp16 are widened while they are packed.
#include <immintrin.h>

#include <cstring>

#include "../nf4.h"
#include "../philox.h"
#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi2")

namespace lora_ops {
namespace avx512 {
#include "avx512.h"
#include "micro.h"
#include "transposed_codes.h"
}  // namespace avx512

const Kernels kAvx512 = avx512::with_decode_transposed(avx512::table("avx512", Arithmetic{}));

}  // namespace lora_ops

#pragma GCC pop_options
