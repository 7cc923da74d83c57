// PTX ISA, "shfl.sync", "vote.sync", "activemask" and "bar.warp.sync": lanes of a warp with each other. The member mask must
// name just the lanes that execute the instruction.
#include "elementwise.h"

namespace ptx {

namespace {

void check_members(Machine& m, const Instruction& in, Slot mask, uint32_t active) {
  const uint32_t* const masks = m.lanes<uint32_t>(mask);
  each_lane(active, [&](int lane) {
    if (masks[lane] != active) {
      m.report("synccheck", lane, "%s names lanes %08x, lanes %08x execute it", in.opcode.c_str(), masks[lane], active);
    }
  });
}

enum class Shuffle : uint32_t { kUp, kDown, kBfly, kIdx };

// shfl.sync d|p, a, b, c, mask: c holds the segment's mask in bits 8-12 and the clamp in bits 0-4
void execute_shuffle(Machine& m, const Instruction& in, uint32_t active) {
  check_members(m, in, in.operand[5], active);
  uint32_t source[kWarpSize], result[kWarpSize], in_range = 0;
  const uint32_t *a = m.lanes<uint32_t>(in.operand[2]), *b = m.lanes<uint32_t>(in.operand[3]),
                 *c = m.lanes<uint32_t>(in.operand[4]);
  for (int lane = 0; lane < kWarpSize; ++lane) source[lane] = a[lane];
  const auto mode = static_cast<Shuffle>(in.immediate);
  each_lane(active, [&](int lane) {
    const int by = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int from = mode == Shuffle::kUp     ? lane - by
               : mode == Shuffle::kDown ? lane + by
               : mode == Shuffle::kBfly ? lane ^ by
                                        : first | (by & ~segment);
    const bool good = mode == Shuffle::kUp ? from >= last : from <= last;
    if (!good) from = lane;
    in_range |= uint32_t{good} << lane;
    if ((active >> from & 1) == 0) m.report("synccheck", lane, "shuffle from lane %d, which does not take part", from);
    result[lane] = source[from];
  });
  for_lanes(m.lanes<uint32_t>(in.operand[0]), active, [&](int lane) { return active >> lane & 1 ? result[lane] : 0; });
  uint32_t& p = m.predicate(in.operand[1]);
  p = (p & ~active) | in_range;
}

void decode_shuffle(Decoder& d) {
  d.allow({"sync", "up", "down", "bfly", "idx"});
  Instruction& in = d.in;
  in.operand[0] = d.destination(0, 4);
  in.operand[1] = d.second_predicate(d.operand(0));
  for (int i = 1; i < 5; ++i) in.operand[1 + i] = d.source(i, 4);
  const Shuffle mode = d.has("up")     ? Shuffle::kUp
                       : d.has("down") ? Shuffle::kDown
                       : d.has("bfly") ? Shuffle::kBfly
                                       : Shuffle::kIdx;
  in.immediate = static_cast<uint32_t>(mode);
  in.execute = execute_shuffle;
}

enum class Vote : uint32_t { kAll, kAny, kUni, kBallot };

void execute_vote(Machine& m, const Instruction& in, uint32_t active) {
  check_members(m, in, in.operand[2], active);
  const uint32_t p = m.predicate(in.operand[1]), ballot = (in.flag ? ~p : p) & active;
  const auto mode = static_cast<Vote>(in.immediate);
  if (mode == Vote::kBallot) {
    return for_lanes(m.lanes<uint32_t>(in.operand[0]), active, [&](int) { return ballot; });
  }
  const bool result = mode == Vote::kAny ? ballot != 0 : ballot == active || (mode == Vote::kUni && ballot == 0);
  uint32_t& to = m.predicate(in.operand[0]);
  to = (to & ~active) | (result ? active : 0);
}

void decode_vote(Decoder& d) {
  d.allow({"sync", "all", "any", "uni", "ballot"});
  Instruction& in = d.in;
  const Vote mode = d.has("ballot") ? Vote::kBallot : d.has("any") ? Vote::kAny : d.has("uni") ? Vote::kUni : Vote::kAll;
  in.immediate = static_cast<uint32_t>(mode);
  in.operand[0] = mode == Vote::kBallot ? d.destination(0, 4) : d.predicate_destination(d.operand(0));
  in.flag = d.operand(1).negated;
  in.operand[1] = d.predicate(d.operand(1));
  in.operand[2] = d.source(2, 4);
  in.execute = execute_vote;
}

void execute_active_mask(Machine& m, const Instruction& in, uint32_t active) {
  for_lanes(m.lanes<uint32_t>(in.operand[0]), active, [&](int) { return active; });
}

// Orders the warp's memory accesses where the whole warp takes part.
void execute_warp_barrier(Machine& m, const Instruction& in, uint32_t active) {
  check_members(m, in, in.operand[0], active);
  if (active != (m.warp->live & ~m.warp->exited)) return;
  if (++m.warp->epoch > kMaxWarpEpoch) fail("more bar.warp.sync between two barriers than a stamp can count");
}

}  // namespace

bool decode_warp(Decoder& d) {
  const std::string& op = d.op();
  if (op == "shfl") {
    decode_shuffle(d);
  } else if (op == "vote") {
    decode_vote(d);
  } else if (op == "activemask") {
    d.in.operand[0] = d.destination(0, 4);
    d.in.execute = execute_active_mask;
  } else if (op == "bar" && d.part(1) == "warp") {
    d.in.operand[0] = d.source(0, 4);
    d.in.execute = execute_warp_barrier;
  } else {
    return false;
  }
  return true;
}

}  // namespace ptx
