// memcheck (bounds, alignment, read-only buffers), initcheck (bytes nobody wrote) and racecheck (two accesses, one a write,
// that no barrier orders), at every access to shared and global memory; and cp.async, whose bytes arrive when they are waited
// for.
//
// The usual access meets stamps of earlier epochs only, which a comparison per granule shows; the rest is looked at closely.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace ptx {

uint32_t Machine::check_shared(const uint64_t* address, uint32_t active, int bytes, Access access) {
  uint32_t good = 0;
  each_lane(active, [&](int lane) { good |= uint32_t{check_shared(address[lane], lane, bytes, access)} << lane; });
  return good;
}

bool Machine::check_shared(uint64_t address, int lane, int bytes, Access access) {
  const char* const verb = access == Access::kRead ? "read" : "write";
  if (address < kFirstShared || address + bytes > shared_bytes_) {
    report("memcheck", lane, "%s of %d bytes at %lld of %lld bytes of shared memory is out of bounds", verb, bytes,
           static_cast<long long>(address) - kFirstShared, static_cast<long long>(shared_bytes_) - kFirstShared);
    return false;
  }
  if (address % bytes != 0) {
    report("memcheck", lane, "%s of %d bytes at %llu of shared memory is misaligned", verb, bytes,
           static_cast<unsigned long long>(address));
    return false;
  }
  const Stamp now = stamp(lane), epoch_start = now & ~(kEpochUnit - 1);
  const size_t first = address / shared.granule;
  const int granules = bytes / shared.granule;
  Stamp* const writers = &shared.writers[first];
  Stamp* const readers = &shared.readers[first];
  bool writer_now = false, reader_now = false, never = false;
  for (int i = 0; i < granules; ++i) {
    writer_now |= writers[i] >= epoch_start;  // or in flight
    reader_now |= readers[i] >= epoch_start;
    never |= writers[i] == kNever;
  }
  if (access == Access::kRead) {
    if (writer_now || never) {
      for (int i = 0; i < granules; ++i) explain_shared(first + i, lane, now, access);
    }
    for (int i = 0; i < granules; ++i) readers[i] = reader_now ? merge_readers(readers[i], now) : now;
  } else {
    if (writer_now || reader_now) {
      for (int i = 0; i < granules; ++i) explain_shared(first + i, lane, now, access);
    }
    for (int i = 0; i < granules; ++i) writers[i] = now;
  }
  return true;
}

void Machine::explain_shared(size_t granule, int lane, Stamp now, Access access) {
  const Stamp writer = shared.writers[granule], reader = shared.readers[granule];
  const unsigned long long at = granule * shared.granule - kFirstShared;
  const auto who = [](Stamp stamp) { return stamp & kWhoMask; };
  if (writer == kInFlight) {
    report("racecheck", lane, "%s of shared byte %llu, which a cp.async in flight writes: no wait before it",
           access == Access::kRead ? "read" : "write", at);
  } else if (access == Access::kRead && writer == kNever) {
    report("initcheck", lane, "read of shared byte %llu, which nobody wrote", at);
  } else if (writer != kNever && unordered(writer, now)) {
    report("racecheck", lane, "%s of shared byte %llu after thread %u wrote it, no barrier between",
           access == Access::kRead ? "read" : "write", at, who(writer));
  } else if (access == Access::kWrite && reader != kNever && unordered(reader, now)) {
    if (who(reader) < kWarpReaders) {
      report("racecheck", lane, "write of shared byte %llu after thread %u read it, no barrier between", at, who(reader));
    } else {
      report("racecheck", lane, "write of shared byte %llu after several threads read it, no barrier between", at);
    }
  }
}

uint32_t Machine::check_global(const uint64_t* address, uint32_t active, int bytes, Access access) {
  uint32_t good = 0;
  each_lane(active, [&](int lane) {
    if (address[lane] % bytes != 0) {
      report("memcheck", lane, "access of %d bytes at %#llx is misaligned", bytes,
             static_cast<unsigned long long>(address[lane]));
    } else {
      good |= uint32_t{check_global(address[lane], lane, bytes, access)} << lane;
    }
  });
  return good;
}

bool Machine::check_global(uint64_t address, int lane, int bytes, Access access) {
  const bool write = access == Access::kWrite;
  Buffer*& buffer = count(*instruction_).buffer;
  const auto offset = [&] { return address - reinterpret_cast<uint64_t>(buffer->data); };
  if (buffer == nullptr || offset() >= buffer->bytes) buffer = global_.find(address);
  if (buffer == nullptr || offset() >= buffer->bytes || buffer->bytes - offset() < static_cast<uint64_t>(bytes)) {
    const long long size = buffer == nullptr ? 0 : static_cast<long long>(buffer->bytes);
    report("memcheck", lane, "%s of %d bytes at %#llx is out of bounds: offset %lld of the nearest buffer, of %lld bytes",
           write ? "write" : "read", bytes, static_cast<unsigned long long>(address),
           buffer == nullptr ? 0 : static_cast<long long>(offset()), size);
    return false;
  }
  const uint64_t at = offset();
  if (write && buffer->readonly) {
    report("memcheck", lane, "write to a read-only buffer, offset %llu", static_cast<unsigned long long>(at));
    return false;
  }
  uint8_t* const initialised = &buffer->initialised[at];
  if (!write && std::memchr(initialised, 0, bytes) != nullptr) {
    const auto* const first = static_cast<uint8_t*>(std::memchr(initialised, 0, bytes));
    report("initcheck", lane, "read of offset %llu of a buffer of %llu bytes, which nobody wrote",
           static_cast<unsigned long long>(at + (first - initialised)), static_cast<unsigned long long>(buffer->bytes));
  }
  if (write) std::memset(initialised, 1, bytes);

  buffer->begin_launch(launch_, kernel.global_granule);
  const uint64_t granule = buffer->granule, base = reinterpret_cast<uint64_t>(buffer->data) / granule;
  const size_t first = address / granule - base, end = (address + bytes - 1) / granule - base + 1;
  const GlobalStamp now = make_global_stamp(block_number_, stamp(lane));
  for (size_t i = first; i < end; ++i) {
    GlobalStamp& writer = buffer->writers[i];
    GlobalStamp& reader = buffer->readers[i];
    if (unordered_global(writer, now) || (write && unordered_global(reader, now)))
      explain_global(*buffer, i, lane, now, access);
    if (write) {
      writer = now;
    } else {
      reader = merge_global_readers(reader, now);
    }
  }
  return true;
}

void Machine::explain_global(Buffer& buffer, size_t granule, int lane, GlobalStamp now, Access access) {
  const bool after_write = unordered_global(buffer.writers[granule], now);
  const GlobalStamp other = after_write ? buffer.writers[granule] : buffer.readers[granule];
  const uint32_t block = block_of(other), thread = static_cast<Stamp>(other) & kWhoMask;
  report("racecheck", lane, "%s of offset %llu of a buffer of %llu bytes after %s by block %lld thread %lld, nothing between",
         access == Access::kRead ? "read" : "write", static_cast<unsigned long long>(granule * buffer.granule),
         static_cast<unsigned long long>(buffer.bytes), after_write ? "a write" : "a read",
         block == kSeveralBlocks ? -1LL : block - 1LL, thread >= kWarpReaders ? -1LL : static_cast<long long>(thread));
}

void Machine::count_global(const Instruction& in, const uint64_t* address, uint32_t good, int bytes, Access access) {
  Counts& counts = count(in);
  const uint64_t before = counts.global_bytes;
  count_sectors(counts, address, good, bytes);
  if (counts.buffer == nullptr) return;
  (access == Access::kRead ? counts.buffer->read : counts.buffer->written) += counts.global_bytes - before;
}

void Machine::begin_copy(const PendingCopy& copy) {
  std::memset(&shared.data[copy.shared], 0xff, copy.bytes);
  for (uint32_t at = 0; at < copy.bytes; at += shared.granule) shared.writers[(copy.shared + at) / shared.granule] = kInFlight;
  warp->copies.push_back(copy);
}

void Machine::wait_copies(uint32_t active, uint32_t pending_groups) {
  auto& copies = warp->copies;
  const auto done = [&](const PendingCopy& copy) {
    if ((active >> copy.lane & 1) == 0 || copy.group + pending_groups >= warp->copy_group[copy.lane]) return false;
    uint8_t* const to = &shared.data[copy.shared];
    std::memcpy(to, reinterpret_cast<const void*>(copy.global), copy.source_bytes);
    std::memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
    for (uint32_t at = 0; at < copy.bytes; at += shared.granule) {
      shared.writers[(copy.shared + at) / shared.granule] = stamp(copy.lane);
    }
    return true;
  };
  copies.erase(std::remove_if(copies.begin(), copies.end(), done), copies.end());
}

}  // namespace ptx
