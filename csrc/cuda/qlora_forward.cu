// y = x W0ᵀ + scaling · S Bᵀ + bias      (M, N) = (M, K) (K, N) + (M, r) (r, N), W0 in 4 bits
//
// Up to eight rows are qlora_gemv.cu's; more, gemm_4bit.cuh's kernel in steps of one chunk. The small tile is for as many rows
// as wait for the codes rather than for tensor cores: narrow, so that there are blocks enough, and three stages of it fit an SM
// twice and more.
#include "qlora_forward.h"

#include "gemm_4bit_launch.cuh"

namespace lora_ops {
namespace {

using SmallForward = Tile4Bit<Tile<32, 64, 128, 1, 3>, true>;
using MediumForward = Tile4Bit<Tile<64, 128, 128, 1, 3>, true>;

template <class T>
void launch_typed_4bit(const Gemm4Bit<false>& p, GemmTile tile, void* stream, const std::string& sizes) {
  const bool small = tile == GemmTile::automatic ? p.gemm.M <= SmallForward::kRows : tile == GemmTile::small;
  if (small) return launch_tile_4bit<T, SmallForward, false>("qlora_forward", p, stream, sizes);
  launch_tile_4bit<T, MediumForward, false>("qlora_forward", p, stream, sizes);
}

}  // namespace

void launch_qlora_forward(const CudaQloraForward& p, void* stream) {
  if (p.tile == GemmTile::automatic && p.M >= 1 && p.M <= kGemvRows) return launch_qlora_gemv(p, stream);
  const char* name = "qlora_forward";
  const std::string sizes = shapes("M", p.M, "K", p.K, "N", p.N, "r", p.r);
  const Gemm gemm = describe(name, p.M, p.N, p.K, p.r, p.x, p.S, p.lora_B, p.scaling, p.bias, {}, p.y, sizes);
  const auto with = with_weight<false>(name, gemm, p.x, p.weight, p.K, sizes);
  if (p.y.dtype == DType::bf16) {
    launch_typed_4bit<Bf16>(with, p.tile, stream, sizes);
  } else {
    launch_typed_4bit<Half>(with, p.tile, stream, sizes);
  }
}

}  // namespace lora_ops

int lora_ops_qlora_forward(const lora_ops::CudaQloraForward* params, void* stream) {
  return lora_ops::report_errors([&] { lora_ops::launch_qlora_forward(*params, stream); });
}
