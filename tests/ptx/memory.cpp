#include "memory.h"

#include <algorithm>

namespace ptx {

void Buffer::begin_launch(uint64_t launch_number, uint32_t granule_bytes) {
  if (launch == launch_number) return;
  launch = launch_number;
  read = written = 0;
  granule = granule_bytes;
  const size_t granules = bytes / granule + 1;
  writers.assign(granules, kNever);
  readers.assign(granules, kNever);
}

uint64_t Buffer::distinct(const std::vector<GlobalStamp>& stamps) const {
  const uint64_t granules = stamps.size() - std::count(stamps.begin(), stamps.end(), GlobalStamp{kNever});
  return std::min(granules * granule, bytes);
}

void GlobalMemory::add(void* data, uint64_t bytes, bool readonly, bool initialised) {
  Buffer& buffer = buffers_[reinterpret_cast<uint64_t>(data)];
  buffer = Buffer{};
  buffer.data = static_cast<uint8_t*>(data);
  buffer.bytes = bytes;
  buffer.readonly = readonly;
  buffer.initialised.assign(bytes, initialised);
}

void GlobalMemory::initialise(const void* data, uint64_t bytes) {
  const uint64_t address = reinterpret_cast<uint64_t>(data);
  Buffer* buffer = find(address);
  if (buffer == nullptr) return;
  const uint64_t first = address - reinterpret_cast<uint64_t>(buffer->data);
  const uint64_t last = std::min(first + bytes, buffer->bytes);
  if (first < last) std::fill(buffer->initialised.begin() + first, buffer->initialised.begin() + last, 1);
}

Buffer* GlobalMemory::find(uint64_t address) {
  auto after = buffers_.upper_bound(address);
  return after == buffers_.begin() ? nullptr : &std::prev(after)->second;
}

void SharedMemory::clear(uint32_t bytes, uint32_t granule_bytes) {
  granule = granule_bytes;
  data.assign(bytes, 0xff);
  writers.assign(bytes / granule + 1, kNever);
  readers.assign(bytes / granule + 1, kNever);
}

}  // namespace ptx
