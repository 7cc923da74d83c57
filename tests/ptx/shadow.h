// Who touched a piece of memory last, and whether that is ordered before an access now. A stamp is
//
//     epoch << 19 | warp_epoch << 11 | who
//
// epoch: how many bar.sync the block has passed, from 1; what happened in an earlier epoch is ordered before this one.
// warp_epoch: how many bar.warp.sync the warp has passed in this epoch, which orders accesses of its own lanes.
// who: a thread; or all of a warp, or several warps, where several have read.
#pragma once

#include <cstdint>

namespace ptx {

using Stamp = uint32_t;

constexpr int kWhoBits = 11, kWarpEpochBits = 8;
constexpr Stamp kEpochUnit = 1u << (kWhoBits + kWarpEpochBits);
constexpr uint32_t kMaxEpoch = (1u << 13) - 2, kMaxWarpEpoch = (1u << kWarpEpochBits) - 1;
constexpr Stamp kWhoMask = (1u << kWhoBits) - 1, kWarpReaders = 1024, kSeveralWarps = kWhoMask;

constexpr Stamp kNever = 0;
constexpr Stamp kInFlight = 0xffffffffu;  // written by a cp.async that nobody has waited for

inline Stamp make_stamp(uint32_t epoch, uint32_t warp_epoch, uint32_t thread) {
  return epoch * kEpochUnit | warp_epoch << kWhoBits | thread;
}
inline uint32_t warp_of(Stamp stamp) {
  const Stamp who = stamp & kWhoMask;
  return who < kWarpReaders ? who / 32 : who == kSeveralWarps ? kSeveralWarps : who - kWarpReaders;
}
inline bool same_epoch(Stamp a, Stamp b) {
  return (a ^ b) < kEpochUnit;
}

// Whether `earlier`, one side being a write, and `now` are a race.
inline bool unordered(Stamp earlier, Stamp now) {
  if (!same_epoch(earlier, now) || ((earlier ^ now) & kWhoMask) == 0) return false;
  return warp_of(earlier) != warp_of(now) || ((earlier ^ now) >> kWhoBits) == 0;
}

// Two readers as one.
inline Stamp merge_readers(Stamp earlier, Stamp now) {
  if (!same_epoch(earlier, now) || ((earlier ^ now) & kWhoMask) == 0) return now;
  if (warp_of(earlier) != warp_of(now)) return now | kSeveralWarps;
  if (((earlier ^ now) >> kWhoBits) != 0) return now;
  return (now & ~kWhoMask) | (kWarpReaders + warp_of(now));
}

// In global memory blocks come in: block << 32 | stamp, block from 1. Nothing orders two blocks of a launch.
using GlobalStamp = uint64_t;

constexpr uint32_t kSeveralBlocks = 0xffffffffu;

inline GlobalStamp make_global_stamp(uint32_t block, Stamp stamp) {
  return GlobalStamp{block} << 32 | stamp;
}
inline uint32_t block_of(GlobalStamp stamp) {
  return static_cast<uint32_t>(stamp >> 32);
}

inline bool unordered_global(GlobalStamp earlier, GlobalStamp now) {
  if (earlier == kNever) return false;
  return block_of(earlier) != block_of(now) || unordered(static_cast<Stamp>(earlier), static_cast<Stamp>(now));
}
inline GlobalStamp merge_global_readers(GlobalStamp earlier, GlobalStamp now) {
  if (earlier == kNever) return now;
  if (block_of(earlier) != block_of(now)) return make_global_stamp(kSeveralBlocks, static_cast<Stamp>(now));
  return make_global_stamp(block_of(now), merge_readers(static_cast<Stamp>(earlier), static_cast<Stamp>(now)));
}

}  // namespace ptx
