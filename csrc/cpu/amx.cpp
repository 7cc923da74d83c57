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
#include "transposed_codes.h"

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

void pack_left(const Matrix& src, int rows, int64_t k, float* out) {
  const int64_t whole = k / 32 * 32, bytes = (k - whole) * 2;
  constexpr int64_t kBlock = 2 * kRegister;
  for (int i = 0; i < (rows <= kTileRows ? kTileRows : 2 * kTileRows); ++i) {
    float* to = out + i * 16;
    if (i >= rows) {
      for (int64_t k0 = 0; k0 < k; k0 += 32, to += kBlock) V::store(to, V::zero());
      continue;
    }
    const char* from = src.at(i, 0);
    for (int64_t k0 = 0; k0 < whole; k0 += 32, from += kLine, to += kBlock)
      V::store(to, V::load(reinterpret_cast<const float*>(from)));
    if (bytes) {
      V::store(to, V::zero());
      std::memcpy(to, from, bytes);
    }
  }
}

// kBelow: there are more than 16 rows. kRight: there are two vectors of columns.
template <bool kBelow, bool kRight>
void tile_of(const float* left, const float* panel, int64_t vector_stride, int64_t steps, float* c, bool accumulate,
             const Ahead& ahead) {
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
    const auto fetch = [&](const char* from, int64_t step) {
      for (int64_t b = s * step; from && b < (s + kTileSteps) * step; b += kLine) __builtin_prefetch(from + b, 0, 2);
    };
    fetch(ahead.left, ahead.left_step);
    fetch(ahead.right, ahead.right_step);
    for (const char* piece : ahead.pieces) fetch(piece, ahead.pieces_step / 2);
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
               bool accumulate, const Ahead& ahead) {
  const auto of = rows > kTileRows ? (vectors == 2 ? tile_of<true, true> : tile_of<true, false>)
                                   : (vectors == 2 ? tile_of<false, true> : tile_of<false, false>);
  of(left, panel, vector_stride, steps, c, accumulate, ahead);
}

#include "amx_strip.h"

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

}  // namespace amx

const Kernels kAmx =
    amx::with_strips(amx::with_pairs(amx::with_decode_transposed(amx::table("amx", {2 * amx::kTileRows,
                                                                                    2,
                                                                                    amx::kTileSteps,
                                                                                    {128, 8, 512},
                                                                                    amx::begin,
                                                                                    amx::end,
                                                                                    amx::pack_left,
                                                                                    amx::pack_pairs_transposed<amx::kTileSteps>,
                                                                                    amx::pack_pairs_straight<amx::kTileSteps>,
                                                                                    amx::tile_bf16,
                                                                                    nullptr,
                                                                                    amx::multiply_adds_bf16}))));

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
