// A kernel as the machine runs it: every operand is a place in the warp's register file, every instruction a function.
//
// A register file holds, one after the other, a kernel's registers, the special registers it reads and its constants, each as
// 32 lanes of its width; a predicate is one word with a bit per lane. So no instruction asks what its operands are.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kNowhere = 1 << 30;  // the reconvergence point of branches whose paths meet only at the exit

class Machine;
using Slot = uint32_t;  // byte offset in the register file

enum class Kind : uint8_t { kUnsigned, kSigned, kBits, kFloat, kBfloat, kPredicate };
struct Type {
  Kind kind = Kind::kBits;
  uint8_t bytes = 4;
  bool pair = false;  // f16x2 and bf16x2: bytes is a half's

  bool floating() const { return kind == Kind::kFloat || kind == Kind::kBfloat; }
};

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kParam, kConst };
enum class Flow : uint8_t { kNone, kBranch, kExit, kBarrier };

constexpr int kMaxOperands = 14;  // of mma: 4 + 4 + 2 + 4

struct Instruction {
  void (*execute)(Machine&, const Instruction&, uint32_t active) = nullptr;
  Flow flow = Flow::kNone;
  bool guarded = false, guard_negated = false;
  Slot guard = 0;
  int target = 0, reconvergence = kNowhere;  // of a branch

  Slot operand[kMaxOperands] = {};  // destinations first
  // What a family makes of its opcode's modifiers.
  Space space = Space::kGeneric;
  Type type, source_type;
  uint8_t register_bytes = 0;         // of what is loaded or stored, or of a conversion's destination
  uint8_t source_register_bytes = 0;  // of a conversion's source
  uint8_t count = 1;                  // of vector elements, or of ldmatrix's matrices
  uint8_t address_bytes = 8;
  bool flag = false;
  uint32_t immediate = 0;
  int64_t offset = 0;         // of an address
  int32_t shared_offset = 0;  // of cp.async's destination

  int ptx_line = 0;
  std::string source;  // .cu file:line
  std::string opcode;
  std::string text;
};

struct SpecialRegister {
  Slot slot;
  int index;  // in kSpecialRegisters
};

struct Parameter {
  std::string name;
  uint32_t offset, bytes;
};

constexpr uint32_t kFirstShared = 1024;  // what is below is the system's, as from sm_80 on

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t max_threads = 1024;
  uint32_t static_shared_bytes = 0;
  uint32_t dynamic_shared_offset = 0;
  // The smallest access: what a checker tells apart.
  uint32_t shared_granule = 16, global_granule = 16;
  std::vector<uint8_t> registers;  // as a block finds them: constants, and a pattern that is a NaN elsewhere
  std::vector<SpecialRegister> special;
};

[[noreturn]] inline void fail(const std::string& message) {
  throw std::runtime_error(message);
}

}  // namespace ptx
