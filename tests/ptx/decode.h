// From statements to instructions: operands become slots, each opcode family picks a function.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "parser.h"
#include "program.h"

namespace ptx {

// A variable of the module that kernels share: where it lies.
using GlobalVariables = std::map<std::string, uint64_t>;

Kernel decode(const Source& source, const Entry& entry, const GlobalVariables& globals);

// One statement, as a family sees it.
class Decoder {
 public:
  Decoder(Kernel& kernel, const Source& source, const Entry& entry, const GlobalVariables& globals);
  void decode(const Statement& s);
  void finish();  // what is known only when all is decoded

  const std::string& op() const { return statement_->parts[0]; }
  const std::string& part(size_t i) const;
  bool has(const char* part) const { return statement_->has(part); }
  // The modifiers are these or types, or the statement is not implemented.
  void allow(std::initializer_list<const char*> modifiers) const;
  Type type(int n = 0) const;  // the n-th of the opcode
  int types() const;
  size_t count() const { return statement_->operands.size(); }
  const Operand& operand(size_t i) const;
  [[noreturn]] void unsupported(const char* why) const;

  Slot source(const Operand& o, int bytes);
  Slot source(size_t i, int bytes) { return source(operand(i), bytes); }
  Slot destination(const Operand& o, int bytes);
  Slot destination(size_t i, int bytes) { return destination(operand(i), bytes); }
  Slot predicate(const Operand& o);
  Slot predicate_destination(const Operand& o);
  Slot second_predicate(const Operand& o);  // q of p|q, or a place that nobody reads
  int register_bytes(const Operand& o) const;
  // [base + offset]: base into in.operand[place], the rest into in.offset and in.address_bytes
  void address(size_t i, int place);
  // The items of {a, b}, or the operand alone.
  static std::vector<Operand> items(const Operand& o);
  uint32_t immediate(size_t i) const;
  void shared_access(int bytes) { kernel.shared_granule = std::min<uint32_t>(kernel.shared_granule, bytes); }
  void global_access(int bytes) { kernel.global_granule = std::min<uint32_t>(kernel.global_granule, bytes); }

  Kernel& kernel;
  Instruction in;

 private:
  Slot allocate(int bytes_per_lane);
  Slot constant(uint64_t value, int bytes);
  Slot special(const std::string& name);
  Slot symbol(const Operand& o, int bytes);
  void place_shared(const std::string& name, const Variable& variable);

  const Source& source_;
  const Entry& entry_;
  const GlobalVariables& globals_;
  const Statement* statement_ = nullptr;
  std::vector<Slot> registers_;
  std::map<std::pair<uint64_t, int>, Slot> constants_;
  std::map<std::string, uint32_t> shared_;
  std::vector<std::pair<Slot, int>> dynamic_shared_;  // constants that are its address, and their width
  Slot unread_ = 0;
};

// Each returns false where the opcode is another family's.
bool decode_integer(Decoder&);
bool decode_float(Decoder&);
bool decode_move(Decoder&);
bool decode_convert(Decoder&);
bool decode_memory(Decoder&);
bool decode_warp(Decoder&);
bool decode_tensor(Decoder&);

// Sets every branch's reconvergence: the immediate post-dominator of its block.
void find_reconvergence(Kernel& kernel);

}  // namespace ptx
