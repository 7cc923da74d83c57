// What every CUDA op's struct may hold beside ../params.h's Matrix: all addresses are the device's.
#pragma once

#include "../params.h"

namespace lora_ops {

// ../params.h's Dropout, whose seed stays on the device: nothing waits for it, and a captured graph redraws its mask.
struct DeviceDropout {
  const uint64_t* seed = nullptr;  // (1)
  uint32_t threshold = 0;          // round(65536 p); 0: no dropout, and seed may be null
  float keep_scale = 1.f;          // 1 / (1 - p)
};

// Which of the kernel's tiles: chosen by shape, or as somebody measured. Operands that are not aligned to 16 bytes take
// `medium`.
enum class GemmTile : int { automatic = 0, small = 1, medium = 2, large = 3 };

constexpr int kMaxGroup = 4;  // layers of one launch: query, key and value; gate and up

}  // namespace lora_ops
