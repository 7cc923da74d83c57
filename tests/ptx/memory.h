// Global memory: registered buffers of the process, with what is known of every byte. And shared memory of one block.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "shadow.h"

namespace ptx {

struct Buffer {
  uint8_t* data = nullptr;
  uint64_t bytes = 0;
  bool readonly = false;
  std::vector<uint8_t> initialised;  // per byte, 0 or 1

  // Of the last launch that touched it: bytes that its accesses moved, as if there were no cache; and stamps per granule.
  uint64_t launch = 0;
  uint64_t read = 0, written = 0;
  uint32_t granule = 0;
  std::vector<GlobalStamp> writers, readers;

  void begin_launch(uint64_t launch_number, uint32_t granule_bytes);
  // Bytes that have a stamp: read or written at least once.
  uint64_t distinct(const std::vector<GlobalStamp>& stamps) const;
};

class GlobalMemory {
 public:
  void add(void* data, uint64_t bytes, bool readonly, bool initialised);
  void initialise(const void* data, uint64_t bytes);
  // The buffer that the address lies in, or the one nearest below it, or null.
  Buffer* find(uint64_t address);
  const std::map<uint64_t, Buffer>& buffers() const { return buffers_; }
  void clear() { buffers_.clear(); }

 private:
  std::map<uint64_t, Buffer> buffers_;
};

struct SharedMemory {
  std::vector<uint8_t> data;
  uint32_t granule = 1;
  std::vector<Stamp> writers, readers;  // per granule; a writer kNever: not initialised

  void clear(uint32_t bytes, uint32_t granule_bytes);
};

}  // namespace ptx
