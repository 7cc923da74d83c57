// AMX: bf16 products on tile registers, everything else as in AVX-512.
//
// A tile register holds 16 rows of 64 bytes. tdpbf16ps multiplies 16 rows x 32 k of the left operand by 32 k x 16 columns of
// the right one, whose rows are pairs of k: 16 steps of a panel's vector as they are packed for every bf16 product
// (pairs.h). The left operand is not transposed:
//
//     left   [16 steps][2][16 rows][32 k]     two registers of 16 rows
//
// 32 x 32 tiles: four accumulators, two registers of each operand, four loads for four products. A load takes half as long as
// a product if it comes from L1, and as long from L2, so what counts is that one operand is in L1: blocks of 256 k, 16 KB for
// a tile of the left operand and as much for each panel.
#include <immintrin.h>

#include <cstring>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../nf4.h"
#include "../philox.h"
#include "dispatch.h"
#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma,f16c,bmi2")

namespace lora_ops {
namespace amx {
#include "avx512.h"
#include "micro.h"
#include "pairs.h"

constexpr int kTileSteps = 16;             // steps of one product: 32 k
constexpr int kTileRows = 16;              // rows of a tile register
constexpr int kLine = 64;                  // bytes of its rows
constexpr int kRegister = kTileRows * 16;  // floats of a tile register
constexpr int kRowBytes = kPanel * 4;      // of c

// All eight registers alike. Constant memory: the intrinsic tells the compiler of its first bytes only.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {kLine, kLine, kLine, kLine, kLine, kLine, kLine, kLine};
  uint8_t rows[16] = {kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows};
};
constexpr TileConfig kTileConfig;
static_assert(sizeof(TileConfig) == 64);

void begin() {
  _tile_loadconfig(&kTileConfig);
}

void end() {
  _tile_release();
}

void split(const Matrix& src, int64_t count, uint16_t* const out[3]) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int here = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    alignas(64) float wide[kPanel];
    widen_row(Matrix{src.at(0, i), 0, 1, src.dtype}, here, Mask{}, wide);
    V::T rest = V::load(wide);
    for (int p = 0; p < 3; ++p) {
      alignas(64) uint16_t part[kLanes];
      V::store_bf16(part, rest);
      const __m512 taken = V::load_bf16(part);
      const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_sub_ps(taken, taken), _mm512_setzero_ps(), _CMP_EQ_OQ);
      rest = _mm512_maskz_sub_ps(finite, rest, taken);
      std::memcpy(out[p] + i, part, here * sizeof(uint16_t));
    }
  }
}

void pack_left(const Matrix& src, int rows, int64_t k, Mask mask, float* out) {
  const int64_t whole = k / 32 * 32, bytes = (k - whole) * 2;
  constexpr int64_t kBlock = 2 * kRegister;
  for (int i = 0; i < (rows <= kTileRows ? kTileRows : 2 * kTileRows); ++i) {
    float* to = out + i * 16;
    if (i >= rows) {
      for (int64_t k0 = 0; k0 < k; k0 += 32, to += kBlock) V::store(to, V::zero());
      continue;
    }
    const char* from = src.at(i, 0);
    const auto keep = [&](int64_t k0, __m512i v) {
      _mm512_storeu_si512(to, mask.words ? _mm512_maskz_mov_epi16(mask.bits(i, k0), v) : v);
    };
    for (int64_t k0 = 0; k0 < whole; k0 += 32, from += kLine, to += kBlock) keep(k0, _mm512_loadu_si512(from));
    if (bytes) {
      alignas(64) char part[kLine] = {};
      std::memcpy(part, from, bytes);
      keep(whole, _mm512_load_si512(part));
    }
  }
}

// kBelow: there are more than 16 rows. kRight: there are two vectors of columns.
template <bool kBelow, bool kRight>
void tile_of(const float* left, const float* panel, int64_t vector_stride, int64_t steps, float* c, bool accumulate,
             Ahead ahead) {
  float* below = c + kTileRows * kPanel;
  if (accumulate) {
    _tile_loadd(0, c, kRowBytes);
    if (kRight) _tile_loadd(1, c + kLanes, kRowBytes);
    if (kBelow) _tile_loadd(2, below, kRowBytes);
    if (kBelow && kRight) _tile_loadd(3, below + kLanes, kRowBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; s += kTileSteps) {
    for (int64_t b = 0; b < kTileSteps * ahead.left_step; b += kLine) __builtin_prefetch(ahead.left + b, 0, 2);
    ahead.left += kTileSteps * ahead.left_step;
    for (int64_t b = 0; b < kTileSteps * ahead.panels_step; b += kLine) __builtin_prefetch(ahead.panels + b, 0, 2);
    ahead.panels += kTileSteps * ahead.panels_step;
    _tile_loadd(4, left, kLine);
    _tile_loadd(6, panel, kLine);
    _tile_dpbf16ps(0, 4, 6);
    if (kRight) {
      _tile_loadd(7, panel + vector_stride, kLine);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kBelow) {
      _tile_loadd(5, left + kRegister, kLine);
      _tile_dpbf16ps(2, 5, 6);
      if (kRight) _tile_dpbf16ps(3, 5, 7);
    }
    left += 2 * kRegister;
    panel += kRegister;
  }
  _tile_stored(0, c, kRowBytes);
  if (kRight) _tile_stored(1, c + kLanes, kRowBytes);
  if (kBelow) _tile_stored(2, below, kRowBytes);
  if (kBelow && kRight) _tile_stored(3, below + kLanes, kRowBytes);
}

void tile_bf16(int rows, int vectors, const float* left, const float* panel, int64_t vector_stride, int64_t steps, float* c,
               bool accumulate, Ahead ahead) {
  const auto of = rows > kTileRows ? (vectors == 2 ? tile_of<true, true> : tile_of<true, false>)
                                   : (vectors == 2 ? tile_of<false, true> : tile_of<false, false>);
  of(left, panel, vector_stride, steps, c, accumulate, ahead);
}

#include "amx_strip.h"

int64_t strip_scratch(int64_t K) {
  return 2 * kChunkOut + kStripRows * (K / kGroup + kLanes) * 4 + kLine;
}

constexpr Kernels with_strips(Kernels kernels) {
  kernels.strip = strip;
  kernels.strip_scratch = strip_scratch;
  return kernels;
}

float multiply_adds_bf16(int64_t iterations) {
  alignas(64) float c[kRegister];
  begin();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(6);
  for (int64_t n = 0; n < iterations; n += kTileSteps) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 6);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(3, 4, 6);
  }
  _tile_stored(0, c, kLine);
  end();
  return c[0];
}

constexpr Arithmetic kBf16 = {2 * kTileRows,
                              2,
                              kTileSteps,
                              {128, 8, 512},
                              begin,
                              end,
                              split,
                              pack_left,
                              pack_pairs_transposed<kTileSteps>,
                              pack_pairs_straight<kTileSteps>,
                              tile_bf16,
                              multiply_adds_bf16};

}  // namespace amx

const Kernels kAmx = amx::with_strips(amx::with_pairs(amx::table("amx", amx::kBf16)));

}  // namespace lora_ops

#pragma GCC pop_options

namespace lora_ops {

// The tile registers' state is large, so Linux gives it to a process only when asked.
bool amx_permitted() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace lora_ops
