// One launch: blocks one after the other, a block's warps each up to the next barrier, a warp's 32 lanes in lock step.
//
// Divergence: a stack of (pc, reconvergence pc, lanes) per warp. A branch whose lanes disagree pushes both sides; each runs to
// the branch's immediate post-dominator, where they are one again.
#pragma once

#include <string>
#include <vector>

#include "counters.h"
#include "memory.h"
#include "program.h"
#include "reports.h"

namespace ptx {

struct Geometry;

struct Path {
  int pc, reconvergence;
  uint32_t lanes;
};

// A cp.async under way.
struct PendingCopy {
  int lane;
  uint32_t group;
  uint32_t shared;
  uint64_t global;
  uint32_t bytes, source_bytes;
};

struct Warp {
  uint32_t index = 0;
  std::vector<uint8_t> registers;
  std::vector<Path> stack;
  uint32_t live = 0, exited = 0;  // lanes
  uint32_t epoch = 0;             // bar.warp.sync since the last bar.sync
  const Instruction* barrier = nullptr;
  std::vector<PendingCopy> copies;
  uint32_t copy_group[kWarpSize] = {};  // that the lane's next cp.async belongs to
};

enum class Access { kRead, kWrite };

class Machine {
 public:
  Machine(const Kernel& kernel, const Geometry& geometry, const uint8_t* parameters, GlobalMemory& global, Reports& reports,
          std::vector<Counts>& counts, uint64_t launch, bool reverse);
  void run();

  // For instructions.
  template <class T>
  T* lanes(Slot slot) {
    return reinterpret_cast<T*>(warp->registers.data() + slot);
  }
  uint32_t& predicate(Slot slot) { return *lanes<uint32_t>(slot); }
  uint32_t thread(int lane) const { return warp->index * kWarpSize + lane; }
  Counts& count(const Instruction& in) { return counts_[&in - kernel.code.data()]; }

  void addresses(const Instruction& in, Slot base, uint64_t (&address)[kWarpSize]);
  // Lanes whose access may go on. Everything that is wrong with it is reported.
  uint32_t check_shared(const uint64_t* address, uint32_t active, int bytes, Access access);
  uint32_t check_global(const uint64_t* address, uint32_t active, int bytes, Access access);
  bool check_shared(uint64_t address, int lane, int bytes, Access access);
  bool check_global(uint64_t address, int lane, int bytes, Access access);
  // Sectors of a checked access, and the bytes that it moves of its buffer: that of its last lane, as of all others.
  void count_global(const Instruction& in, const uint64_t* address, uint32_t good, int bytes, Access access);
  void begin_copy(const PendingCopy& copy);
  void wait_copies(uint32_t active, uint32_t pending_groups);

  __attribute__((format(printf, 4, 5))) void report(const char* kind, int lane, const char* format, ...);

  const Kernel& kernel;
  const uint8_t* const parameters;
  SharedMemory shared;
  Warp* warp = nullptr;

 private:
  void begin_block();
  void run_block();
  bool run_warp();  // to a barrier, or true at its end
  void branch(Path& path, const Instruction& in, uint32_t taken, uint32_t others);
  void exit(uint32_t active);
  void arrive(const Instruction& in, uint32_t active);
  void release_barrier();
  void explain_shared(size_t granule, int lane, Stamp now, Access access);
  void explain_global(Buffer& buffer, size_t granule, int lane, GlobalStamp now, Access access);
  Stamp stamp(int lane) const { return make_stamp(epoch_, warp->epoch, thread(lane)); }

  const uint32_t grid_[3], block_[3];
  uint32_t block_index_[3] = {};
  uint32_t block_number_ = 0;  // from 1
  uint32_t epoch_ = 1;
  const uint32_t shared_bytes_;
  GlobalMemory& global_;
  Reports& reports_;
  std::vector<Counts>& counts_;
  const uint64_t launch_;
  const bool reverse_;
  uint64_t executed_ = 0;
  const Instruction* instruction_ = nullptr;  // that runs now: what reports name
  std::vector<Warp> warps_;
};

// result = f(lane) for all lanes, stored for the active ones; f has no side effects.
template <class T, class F>
void for_lanes(T* result, uint32_t active, F f) {
  T values[kWarpSize];
  for (int lane = 0; lane < kWarpSize; ++lane) values[lane] = f(lane);
  if (active == kAllLanes) {
    for (int lane = 0; lane < kWarpSize; ++lane) result[lane] = values[lane];
  } else {
    for (int lane = 0; lane < kWarpSize; ++lane) result[lane] = active >> lane & 1 ? values[lane] : result[lane];
  }
}

// Calls f(lane) for each active lane, in order.
template <class F>
void each_lane(uint32_t active, F f) {
  for (; active != 0; active &= active - 1) f(__builtin_ctz(active));
}

}  // namespace ptx
