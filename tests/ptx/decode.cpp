#include "decode.h"

#include <algorithm>
#include <cstring>

#include "special.h"

namespace ptx {

namespace {

constexpr uint8_t kPoison = 0x7f;  // 0x7f7f7f7f: no address, and 3.4e38 as a float

bool decode_flow(Decoder& d) {  // PTX ISA, "Control Flow Instructions"; "bar"
  if (d.op() == "bra") {
    d.in.flow = Flow::kBranch;
  } else if (d.op() == "ret" || d.op() == "exit") {
    d.in.flow = Flow::kExit;
  } else if (d.op() == "bar" && d.part(1) == "sync") {
    if (d.count() != 1 || d.immediate(0) != 0) d.unsupported("barrier 0 of the whole block is the only one");
    d.in.flow = Flow::kBarrier;
  } else {
    return false;
  }
  return true;
}

}  // namespace

Decoder::Decoder(Kernel& k, const Source& source, const Entry& entry, const GlobalVariables& globals)
    : kernel(k), source_(source), entry_(entry), globals_(globals) {
  for (const Type& type : entry.registers) {
    registers_.push_back(type.kind == Kind::kPredicate ? allocate(0) : allocate(std::max<int>(type.bytes, 2)));
  }
  unread_ = allocate(8);
  for (const auto& [name, variable] : entry.variables) place_shared(name, variable);
}

Slot Decoder::allocate(int bytes_per_lane) {
  const Slot slot = static_cast<Slot>((kernel.registers.size() + 63) / 64 * 64);
  kernel.registers.resize(slot + std::max(4, bytes_per_lane * kWarpSize), kPoison);
  return slot;
}

void Decoder::place_shared(const std::string& name, const Variable& variable) {
  if (variable.space != Space::kShared) fail("variable " + name + ": only shared variables lie in a kernel");
  const uint32_t at = (kernel.static_shared_bytes + variable.alignment - 1) / variable.alignment * variable.alignment;
  shared_[name] = kFirstShared + at;
  kernel.static_shared_bytes = at + static_cast<uint32_t>(variable.bytes);
}

void Decoder::decode(const Statement& s) {
  statement_ = &s;
  in = Instruction{};
  in.ptx_line = s.ptx_line;
  in.source = source_.describe(s.location);
  in.opcode = s.opcode;
  in.text = s.text;
  if (s.guard >= 0) {
    in.guarded = true;
    in.guard_negated = s.guard_negated;
    in.guard = registers_[s.guard];
  }
  const bool known = decode_flow(*this) || decode_move(*this) || decode_integer(*this) || decode_float(*this) ||
                     decode_convert(*this) || decode_memory(*this) || decode_warp(*this) || decode_tensor(*this);
  if (!known) unsupported("unknown opcode");
  if (in.flow == Flow::kNone && in.execute == nullptr) unsupported("this form");
  if (in.flow == Flow::kBranch) {
    const auto label = entry_.labels.find(operand(0).name);
    if (label == entry_.labels.end()) unsupported("no such label");
    in.target = label->second;
  }
  kernel.code.push_back(in);
}

void Decoder::finish() {
  Instruction end;
  end.flow = Flow::kExit;
  end.text = "the end of the kernel";
  kernel.code.push_back(end);
  kernel.dynamic_shared_offset = kFirstShared + (kernel.static_shared_bytes + 127) / 128 * 128;
  for (const auto& [slot, bytes] : dynamic_shared_) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      uint64_t address;
      std::memcpy(&address, &kernel.registers[slot + lane * bytes], bytes);
      address += kernel.dynamic_shared_offset;
      std::memcpy(&kernel.registers[slot + lane * bytes], &address, bytes);
    }
  }
}

void Decoder::unsupported(const char* why) const {
  fail("PTX line " + std::to_string(statement_->ptx_line) + " (" + in.source + ") is not implemented, " + why + ": " +
       statement_->text);
}

const std::string& Decoder::part(size_t i) const {
  if (i >= statement_->parts.size()) unsupported("its opcode is short");
  return statement_->parts[i];
}

void Decoder::allow(std::initializer_list<const char*> modifiers) const {
  for (size_t i = 1; i < statement_->parts.size(); ++i) {
    Type type;
    const std::string& part = statement_->parts[i];
    if (parse_type(part, type)) continue;
    if (std::none_of(modifiers.begin(), modifiers.end(), [&](const char* m) { return part == m; })) {
      unsupported(("modifier ." + part).c_str());
    }
  }
}

int Decoder::types() const {
  Type type;
  return static_cast<int>(std::count_if(statement_->parts.begin() + 1, statement_->parts.end(),
                                        [&](const std::string& part) { return parse_type(part, type); }));
}

Type Decoder::type(int n) const {
  Type type;
  for (size_t i = 1; i < statement_->parts.size(); ++i) {
    if (parse_type(statement_->parts[i], type) && n-- == 0) return type;
  }
  unsupported("no type");
}

const Operand& Decoder::operand(size_t i) const {
  if (i >= count()) unsupported("too few operands");
  return statement_->operands[i];
}

std::vector<Operand> Decoder::items(const Operand& o) {
  return o.is == Operand::Is::kVector ? o.items : std::vector<Operand>{o};
}

uint32_t Decoder::immediate(size_t i) const {
  if (operand(i).is != Operand::Is::kNumber) unsupported("a number is wanted");
  return static_cast<uint32_t>(operand(i).number);
}

int Decoder::register_bytes(const Operand& o) const {
  if (o.is != Operand::Is::kRegister || entry_.registers[o.index].kind == Kind::kPredicate) unsupported("a register is wanted");
  return std::max<int>(entry_.registers[o.index].bytes, 2);
}

Slot Decoder::constant(uint64_t value, int bytes) {
  if (bytes < 8) value &= (uint64_t{1} << 8 * bytes) - 1;
  const auto [found, is_new] = constants_.insert({{value, bytes}, 0});
  if (is_new) {
    found->second = allocate(bytes);
    for (int lane = 0; lane < kWarpSize; ++lane) std::memcpy(&kernel.registers[found->second + lane * bytes], &value, bytes);
  }
  return found->second;
}

Slot Decoder::special(const std::string& name) {
  const auto* const end = kSpecialRegisters + kSpecialRegisterCount;
  const int index = static_cast<int>(std::find(kSpecialRegisters, end, name) - kSpecialRegisters);
  if (index == kSpecialRegisterCount) unsupported("special register");
  for (const SpecialRegister& s : kernel.special) {
    if (s.index == index) return s.slot;
  }
  kernel.special.push_back({allocate(4), index});
  return kernel.special.back().slot;
}

Slot Decoder::symbol(const Operand& o, int bytes) {
  for (const Parameter& p : entry_.parameters) {
    if (p.name == o.name) return constant(p.offset + o.offset, bytes);
  }
  const auto global = globals_.find(o.name);
  if (global != globals_.end()) return constant(global->second + o.offset, bytes);
  const auto variable = source_.variables().find(o.name);
  if (variable != source_.variables().end() && variable->second.space == Space::kShared) {
    if (variable->second.is_extern) {
      const Slot slot = allocate(bytes);
      for (int lane = 0; lane < kWarpSize; ++lane) std::memcpy(&kernel.registers[slot + lane * bytes], &o.offset, bytes);
      dynamic_shared_.push_back({slot, bytes});
      return slot;
    }
    if (shared_.count(o.name) == 0) place_shared(o.name, variable->second);
  }
  const auto shared = shared_.find(o.name);
  if (shared == shared_.end()) unsupported("unknown name");
  return constant(shared->second + o.offset, bytes);
}

Slot Decoder::source(const Operand& o, int bytes) {
  if (o.negated) unsupported("negated operand");
  switch (o.is) {
    case Operand::Is::kRegister:
      if (register_bytes(o) != std::max(bytes, 2)) unsupported("width of an operand");
      return registers_[o.index];
    case Operand::Is::kNumber:
      return constant(o.number, std::max(bytes, 2));
    case Operand::Is::kSpecial:
      if (bytes != 4) unsupported("width of a special register");
      return special(o.name);
    case Operand::Is::kSymbol:
      return symbol(o, bytes);
    default:
      unsupported("operand");
  }
}

Slot Decoder::destination(const Operand& o, int bytes) {
  if (o.is == Operand::Is::kSink) return unread_;
  if (register_bytes(o) != std::max(bytes, 2)) unsupported("width of the destination");
  return registers_[o.index];
}

Slot Decoder::predicate(const Operand& o) {
  if (o.is == Operand::Is::kNumber) return constant(o.number != 0 ? kAllLanes : 0, 4);
  return predicate_destination(o);
}

Slot Decoder::predicate_destination(const Operand& o) {
  if (o.is == Operand::Is::kSink) return unread_;
  if (o.is != Operand::Is::kRegister || entry_.registers[o.index].kind != Kind::kPredicate)
    unsupported("a predicate is wanted");
  return registers_[o.index];
}

Slot Decoder::second_predicate(const Operand& o) {
  return o.second < 0 ? unread_ : registers_[o.second];
}

void Decoder::address(size_t i, int place) {
  if (operand(i).is != Operand::Is::kAddress) unsupported("an address is wanted");
  const Operand& base = operand(i).items[0];
  in.address_bytes = base.is == Operand::Is::kRegister ? static_cast<uint8_t>(register_bytes(base)) : 8;
  Operand name = base;
  name.offset = 0;
  in.operand[place] = source(name, in.address_bytes);
  in.offset = operand(i).offset;
}

Kernel decode(const Source& source, const Entry& entry, const GlobalVariables& globals) {
  Kernel kernel;
  kernel.name = entry.name;
  kernel.parameters = entry.parameters;
  kernel.parameter_bytes = entry.parameter_bytes;
  kernel.max_threads = entry.max_threads;
  Decoder decoder(kernel, source, entry, globals);
  for (const Statement& s : entry.statements) decoder.decode(s);
  decoder.finish();
  find_reconvergence(kernel);
  return kernel;
}

}  // namespace ptx
