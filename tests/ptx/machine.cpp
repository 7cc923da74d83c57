#include "machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "executor.h"
#include "special.h"

namespace ptx {

namespace {

constexpr uint64_t kMaxInstructions = 1u << 28;  // of a launch: beyond it is an endless loop

}  // namespace

Machine::Machine(const Kernel& k, const Geometry& geometry, const uint8_t* parameter_bytes, GlobalMemory& global,
                 Reports& reports, std::vector<Counts>& counts, uint64_t launch, bool reverse)
    : kernel(k),
      parameters(parameter_bytes),
      grid_{geometry.grid[0], geometry.grid[1], geometry.grid[2]},
      block_{geometry.block[0], geometry.block[1], geometry.block[2]},
      shared_bytes_(kernel.dynamic_shared_offset + geometry.dynamic_shared_bytes),
      global_(global),
      reports_(reports),
      counts_(counts),
      launch_(launch),
      reverse_(reverse) {}

void Machine::run() {
  const uint32_t threads = block_[0] * block_[1] * block_[2];
  warps_.resize((threads + kWarpSize - 1) / kWarpSize);
  for (size_t i = 0; i < warps_.size(); ++i) {
    warps_[i].index = static_cast<uint32_t>(i);
    const uint32_t lanes = std::min<uint32_t>(threads - i * kWarpSize, kWarpSize);
    warps_[i].live = lanes == kWarpSize ? kAllLanes : (1u << lanes) - 1;
  }
  for (Counts& counts : counts_) counts.buffer = nullptr;
  const uint64_t blocks = uint64_t{grid_[0]} * grid_[1] * grid_[2];
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t block = reverse_ ? blocks - 1 - i : i;
    block_number_ = static_cast<uint32_t>(block) + 1;
    block_index_[0] = static_cast<uint32_t>(block % grid_[0]);
    block_index_[1] = static_cast<uint32_t>(block / grid_[0] % grid_[1]);
    block_index_[2] = static_cast<uint32_t>(block / grid_[0] / grid_[1]);
    begin_block();
    run_block();
  }
}

void Machine::begin_block() {
  epoch_ = 1;
  shared.clear(shared_bytes_, kernel.shared_granule);
  for (Warp& w : warps_) {
    warp = &w;
    w.registers = kernel.registers;
    w.stack = {{0, kNowhere, w.live}};
    w.exited = w.epoch = 0;
    w.barrier = nullptr;
    w.copies.clear();
    std::fill(std::begin(w.copy_group), std::end(w.copy_group), 0);
    for (const SpecialRegister& special : kernel.special) {
      uint32_t* const values = lanes<uint32_t>(special.slot);
      for (int lane = 0; lane < kWarpSize; ++lane) {
        const uint32_t t = thread(lane);
        const uint32_t all[kSpecialRegisterCount] = {t % block_[0],
                                                     t / block_[0] % block_[1],
                                                     t / block_[0] / block_[1],
                                                     block_[0],
                                                     block_[1],
                                                     block_[2],
                                                     block_index_[0],
                                                     block_index_[1],
                                                     block_index_[2],
                                                     grid_[0],
                                                     grid_[1],
                                                     grid_[2],
                                                     uint32_t(lane),
                                                     w.index,
                                                     (1u << lane) - 1,
                                                     (2u << lane) - 1,
                                                     1u << lane};
        values[lane] = all[special.index];
      }
    }
  }
}

void Machine::run_block() {
  std::vector<bool> finished(warps_.size());
  for (;;) {
    bool waiting = false;
    for (size_t i = 0; i < warps_.size(); ++i) {
      const size_t w = reverse_ ? warps_.size() - 1 - i : i;
      if (finished[w]) continue;
      warp = &warps_[w];
      finished[w] = run_warp();
      waiting = waiting || !finished[w];
    }
    if (!waiting) return;
    release_barrier();
  }
}

bool Machine::run_warp() {
  Warp& w = *warp;
  for (;;) {
    while (!w.stack.empty() && (w.stack.back().pc == w.stack.back().reconvergence || (w.stack.back().lanes & ~w.exited) == 0)) {
      w.stack.pop_back();
    }
    if (w.stack.empty()) return true;
    Path& path = w.stack.back();
    const Instruction& in = kernel.code[path.pc];
    instruction_ = &in;
    const uint32_t lanes_here = path.lanes & ~w.exited;
    uint32_t active = lanes_here;
    if (in.guarded) active &= in.guard_negated ? ~predicate(in.guard) : predicate(in.guard);
    if (++executed_ > kMaxInstructions) fail("endless loop at PTX line " + std::to_string(in.ptx_line));
    if (in.flow == Flow::kBranch) {
      ++counts_[&in - kernel.code.data()].executions;
      branch(path, in, active, lanes_here & ~active);
      continue;
    }
    ++path.pc;
    if (active == 0) continue;
    ++counts_[&in - kernel.code.data()].executions;
    switch (in.flow) {
      case Flow::kExit:
        exit(active);
        break;
      case Flow::kBarrier:
        arrive(in, active);
        return false;
      default:
        in.execute(*this, in, active);
    }
  }
}

void Machine::branch(Path& path, const Instruction& in, uint32_t taken, uint32_t others) {
  if (taken == 0) {
    ++path.pc;
  } else if (others == 0) {
    path.pc = in.target;
  } else {
    const int next = path.pc + 1;
    path.pc = in.reconvergence;  // what is left here goes on where both sides meet
    if (path.pc == path.reconvergence || in.reconvergence == kNowhere) warp->stack.pop_back();
    warp->stack.push_back({next, in.reconvergence, others});
    warp->stack.push_back({in.target, in.reconvergence, taken});
  }
}

void Machine::exit(uint32_t active) {
  warp->exited |= active;
  for (const PendingCopy& copy : warp->copies) {
    if (active >> copy.lane & 1) report("synccheck", copy.lane, "exits with cp.async that it has not waited for");
  }
}

// PTX ISA, "bar": all threads of a warp take part in it, or none.
void Machine::arrive(const Instruction& in, uint32_t active) {
  const uint32_t expected = warp->live & ~warp->exited;
  if (active != expected) {
    report("synccheck", __builtin_ctz(active), "divergent barrier: lanes %08x of %08x", active, expected);
  }
  warp->barrier = &in;
}

void Machine::release_barrier() {
  const Instruction* barrier = nullptr;
  for (Warp& w : warps_) {
    if (w.barrier != nullptr) {
      instruction_ = w.barrier;
      warp = &w;
      if (barrier != nullptr && barrier != w.barrier) {
        report("synccheck", 0, "warps wait at different barriers, another one at PTX line %d", barrier->ptx_line);
      }
      barrier = w.barrier;
    }
    w.barrier = nullptr;
    w.epoch = 0;
  }
  if (++epoch_ > kMaxEpoch) fail("more barriers than a stamp can count");
}

void Machine::report(const char* kind, int lane, const char* format, ...) {
  std::string* const text = reports_.add(kind, instruction_);
  if (text == nullptr) return;
  char message[300], where[200];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  std::snprintf(where, sizeof where, " | block (%u,%u,%u) thread %u | PTX line %d: ", block_index_[0], block_index_[1],
                block_index_[2], thread(lane), instruction_->ptx_line);
  *text = instruction_->source + ": " + message + where + instruction_->text.substr(0, 100);
}

}  // namespace ptx
