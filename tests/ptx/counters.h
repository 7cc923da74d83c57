// What an instruction costs in memory transactions. CUDA C++ Best Practices Guide, "Coalesced Access to Global Memory" and
// "Shared Memory and Memory Banks".
#pragma once

#include <cstdint>

namespace ptx {

struct Buffer;

struct Counts {
  uint64_t executions = 0;
  uint64_t wavefronts = 0, ideal_wavefronts = 0;
  uint64_t sectors = 0, ideal_sectors = 0;
  uint64_t global_bytes = 0;
  Buffer* buffer = nullptr;  // that the instruction touched last: the first place to look for the next address
};

// 32 banks of 4 bytes; a wavefront serves at most 128 bytes, so lanes that take 8 or 16 bytes go in halves or quarters.
// Lanes that want the same word share it.
void count_wavefronts(Counts& counts, const uint64_t* addresses, uint32_t active, int bytes);

// Sectors are 32 bytes. Ideal: the bytes that the lanes want, packed.
void count_sectors(Counts& counts, const uint64_t* addresses, uint32_t active, int bytes);

}  // namespace ptx
