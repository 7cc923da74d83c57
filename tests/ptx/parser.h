// PTX text to statements whose names are resolved. PTX ISA, "Syntax" and "State Spaces, Types, and Variables".
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "program.h"

namespace ptx {

struct Location {
  int file = 0, line = 0;                // .loc
  int caller_file = 0, caller_line = 0;  // its inlined_at
};

struct Operand {
  enum class Is { kRegister, kNumber, kSpecial, kSymbol, kVector, kAddress, kSink } is = Is::kSink;
  int index = -1;              // of a register
  int second = -1;             // q of p|q
  bool negated = false;        // !p
  uint64_t number = 0;         // integer, or a float's bits
  std::string name;            // of a special register, symbol or label
  int64_t offset = 0;          // of an address or symbol
  std::vector<Operand> items;  // of a vector; of an address, its base
};

struct Statement {
  int ptx_line = 0;
  Location location;
  int guard = -1;
  bool guard_negated = false;
  std::string opcode, text;
  std::vector<std::string> parts;  // opcode, split at dots
  std::vector<Operand> operands;

  bool has(const char* part) const;
};

struct Variable {
  Space space = Space::kShared;
  bool is_extern = false;
  uint32_t alignment = 1;
  uint64_t bytes = 0;
  std::vector<uint8_t> initial;
};

struct Entry {
  std::string name;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0, max_threads = 1024;
  std::vector<Type> registers;
  std::vector<Statement> statements;
  std::map<std::string, int> labels;          // index of the statement that follows
  std::map<std::string, Variable> variables;  // declared in the body
};

// A module's text, its entries found but not yet parsed.
class Source {
 public:
  explicit Source(std::string text);

  bool has(const std::string& entry) const { return entries_.count(entry) != 0; }
  Entry parse(const std::string& entry) const;
  const std::map<std::string, Variable>& variables() const { return variables_; }
  std::string describe(const Location& location) const;

 private:
  std::string text_;
  std::map<std::string, size_t> entries_;  // offset of the name
  std::map<std::string, Variable> variables_;
  std::map<int, std::string> files_;
};

bool parse_type(const std::string& name, Type& type);

}  // namespace ptx
