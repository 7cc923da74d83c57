// A batch whose rows are sorted by adapter, for adapters of different ranks in one launch.
//
// Only adapters that the batch has rows for are listed. How many others there are, somewhere in memory, costs nothing.
#pragma once

#include <cstdint>

namespace lora_ops {

struct SegmentAdapter {
  const void* lora_A;  // (rank, K) contiguous
  const void* lora_B;  // (N, rank) contiguous
  int32_t rank;        // 0: rows without an adapter, and both matrices may be null
  float scaling;
};

struct Segments {
  int count = 0;                             // 1 or more, at most 2^30
  const int32_t* first_row = nullptr;        // (count + 1) ascending from 0 to M: segment i is rows first_row[i] ... first_row[i + 1] - 1
  const SegmentAdapter* adapters = nullptr;  // (count) in the device's memory, all of one dtype
  bool aligned = false;                      // every lora_A begins at a multiple of 16 bytes
};

}  // namespace lora_ops
