// Which segment a block or a warp works for.
#pragma once

#include "segments.h"

namespace lora_ops {

// The last segment that `begins`, which every segment before it does, too, and the first one in any case.
template <class Begins>
__device__ __forceinline__ int last_segment(const Segments& segments, Begins begins) {
  int segment = 0;
  for (int end = segments.count; end - segment > 1;) {
    const int middle = static_cast<unsigned>(segment + end) / 2;
    if (begins(middle)) {
      segment = middle;
    } else {
      end = middle;
    }
  }
  return segment;
}

}  // namespace lora_ops
