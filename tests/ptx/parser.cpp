#include "parser.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "text.h"

namespace ptx {

bool parse_type(const std::string& name, Type& type) {
  static const std::map<std::string, Type> types = {
      {"u8", {Kind::kUnsigned, 1}},        {"u16", {Kind::kUnsigned, 2}},   {"u32", {Kind::kUnsigned, 4}},
      {"u64", {Kind::kUnsigned, 8}},       {"s8", {Kind::kSigned, 1}},      {"s16", {Kind::kSigned, 2}},
      {"s32", {Kind::kSigned, 4}},         {"s64", {Kind::kSigned, 8}},     {"b8", {Kind::kBits, 1}},
      {"b16", {Kind::kBits, 2}},           {"b32", {Kind::kBits, 4}},       {"b64", {Kind::kBits, 8}},
      {"f16", {Kind::kFloat, 2}},          {"f32", {Kind::kFloat, 4}},      {"f64", {Kind::kFloat, 8}},
      {"bf16", {Kind::kBfloat, 2}},        {"pred", {Kind::kPredicate, 4}}, {"f16x2", {Kind::kFloat, 2, true}},
      {"bf16x2", {Kind::kBfloat, 2, true}}};
  const auto found = types.find(name);
  if (found == types.end()) return false;
  type = found->second;
  return true;
}

bool Statement::has(const char* part) const {
  return std::find(parts.begin() + 1, parts.end(), part) != parts.end();
}

namespace {

// Comments become blanks, so that lines and offsets stay.
void blank_comments(std::string& s) {
  for (size_t i = 0; (i = s.find('/', i)) != std::string::npos; ++i) {
    size_t end;
    if (starts_with(s, "//", i)) {
      end = std::min(s.find('\n', i), s.size());
    } else if (starts_with(s, "/*", i)) {
      end = std::min(s.find("*/", i), s.size() - 2) + 2;
    } else {
      continue;
    }
    for (; i < end; ++i) s[i] = s[i] == '\n' ? '\n' : ' ';
  }
}

bool parse_number(const std::string& s, uint64_t& number) {
  if (s.size() > 2 && s[0] == '0' && (std::strchr("fFdD", s[1]) != nullptr)) {  // a float's bits
    number = std::strtoull(s.c_str() + 2, nullptr, 16);
    return true;
  }
  const size_t digit = s[0] == '-' || s[0] == '+';
  if (digit >= s.size() || !std::isdigit(static_cast<unsigned char>(s[digit]))) return false;
  number = std::strtoull(s.c_str() + digit, nullptr, 0);
  if (s[0] == '-') number = -number;
  return true;
}

// [.extern] .space .align n .type name[count] = { ... }
std::pair<std::string, Variable> parse_variable(const std::string& s) {
  Variable variable;
  const size_t equals = s.find('=');
  const std::string head = s.substr(0, equals);
  variable.is_extern = head.find(".extern") != std::string::npos;
  variable.space = head.find(".shared") != std::string::npos  ? Space::kShared
                   : head.find(".const") != std::string::npos ? Space::kConst
                                                              : Space::kGlobal;
  const size_t bracket = head.find('[');
  std::string name = trim(head.substr(0, bracket));
  const size_t blank = name.find_last_of(" \t");
  Type type;
  for (const std::string& word : split(name.substr(0, blank), ' ')) {
    if (word[0] == '.') parse_type(trim(word).substr(1), type);
  }
  name = name.substr(blank + 1);
  // A parameter `.u64 .ptr .align n` says how what it points to is aligned.
  const bool pointer = head.find(".ptr") != std::string::npos;
  variable.alignment = pointer ? type.bytes : static_cast<uint32_t>(number_after(head, ".align", type.bytes));
  variable.bytes = type.bytes * (bracket == std::string::npos ? 1 : std::strtoull(head.c_str() + bracket + 1, nullptr, 0));
  variable.initial.resize(variable.bytes);
  if (equals != std::string::npos) {
    std::string values = trim(s.substr(equals + 1));
    if (values[0] == '{') values = values.substr(1, values.rfind('}') - 1);
    size_t at = 0;
    for (const std::string& value : split(values, ',')) {
      uint64_t number;
      if (!parse_number(trim(value), number) || at + type.bytes > variable.bytes) fail("initial value of " + name);
      std::memcpy(&variable.initial[at], &number, type.bytes);
      at += type.bytes;
    }
  }
  return {name, variable};
}

class BodyParser {
 public:
  BodyParser(Entry& entry, const std::string& text, int line) : entry_(entry), text_(text), line_(line) {}

  void parse() {
    Location location;
    for (size_t i = 0; i < text_.size();) {
      const char c = text_[i];
      if (std::isspace(static_cast<unsigned char>(c)) || c == ';') {
        line_ += c == '\n';
        ++i;
      } else if (c == '{') {
        scopes_.emplace_back();
        ++i;
      } else if (c == '}') {
        scopes_.pop_back();
        ++i;
      } else if (starts_with(text_, ".loc", i)) {
        const size_t end = text_.find('\n', i);
        location = parse_location(text_.substr(i, end - i));
        i = end;
      } else {
        size_t end = i;
        while (name_character(text_[end])) ++end;
        if (end > i && text_[end] == ':') {
          entry_.labels[text_.substr(i, end - i)] = static_cast<int>(entry_.statements.size());
          i = end + 1;
          continue;
        }
        end = text_.find(';', i);
        if (end == std::string::npos) fail("no ';' after PTX line " + std::to_string(line_));
        const std::string text = trim(text_.substr(i, end - i));
        statement(text, location);
        line_ += static_cast<int>(std::count(text_.begin() + i, text_.begin() + end, '\n'));
        i = end;
      }
    }
  }

 private:
  static Location parse_location(const std::string& s) {
    Location location;
    std::sscanf(s.c_str(), ".loc %d %d", &location.file, &location.line);
    const size_t at = s.find("inlined_at");
    if (at != std::string::npos) std::sscanf(s.c_str() + at, "inlined_at %d %d", &location.caller_file, &location.caller_line);
    return location;
  }

  void statement(const std::string& text, const Location& location) {
    if (starts_with(text, ".reg")) return declare_registers(text.substr(4));
    if (starts_with(text, ".pragma")) return;
    if (text[0] == '.') {
      entry_.variables.insert(parse_variable(text));
      return;
    }
    Statement s;
    s.ptx_line = line_;
    s.location = location;
    s.text = text;
    size_t at = 0;
    if (text[0] == '@') {
      const size_t end = text.find_first_of(" \t");
      const Operand guard = operand(text.substr(1, end - 1));
      s.guard = guard.index;
      s.guard_negated = guard.negated;
      at = text.find_first_not_of(" \t", end);
    }
    const size_t end = std::min(text.find_first_of(" \t\n", at), text.size());
    s.opcode = text.substr(at, end - at);
    s.parts = split(s.opcode, '.');
    const std::string operands = trim(text.substr(end));
    if (!operands.empty()) {
      for (const std::string& o : split(operands, ',')) s.operands.push_back(operand(trim(o)));
    }
    entry_.statements.push_back(std::move(s));
  }

  void declare_registers(const std::string& text) {  // .type name<count>, name
    const std::string s = trim(text);
    const size_t blank = s.find_first_of(" \t");
    Type type;
    if (!parse_type(s.substr(1, blank - 1), type)) fail("register type in: " + s);
    for (const std::string& item : split(s.substr(blank), ',')) {
      const std::string name = trim(item);
      const size_t angle = name.find('<');
      const int count = angle == std::string::npos ? 1 : std::atoi(name.c_str() + angle + 1);
      for (int i = 0; i < count; ++i) {
        scopes_.back()[angle == std::string::npos ? name : name.substr(0, angle) + std::to_string(i)] =
            static_cast<int>(entry_.registers.size());
        entry_.registers.push_back(type);
      }
    }
  }

  int find_register(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(name);
      if (found != scope->end()) return found->second;
    }
    return -1;
  }

  Operand operand(const std::string& s) const {
    Operand o;
    if (s == "_") return o;
    if (s[0] == '{') {
      o.is = Operand::Is::kVector;
      for (const std::string& item : split(s.substr(1, s.rfind('}') - 1), ',')) o.items.push_back(operand(trim(item)));
      return o;
    }
    if (s[0] == '[') {
      o.is = Operand::Is::kAddress;
      const std::string inside = trim(s.substr(1, s.rfind(']') - 1));
      o.items.push_back(operand(inside.substr(0, inside.find('+'))));
      o.offset = offset_of(inside);
      return o;
    }
    if (s[0] == '!') {
      o = operand(s.substr(1));
      o.negated = true;
      return o;
    }
    const size_t bar = s.find('|');
    if (bar != std::string::npos) {
      o = operand(s.substr(0, bar));
      o.second = find_register(trim(s.substr(bar + 1)));
      return o;
    }
    o.index = find_register(s);
    if (o.index >= 0) {
      o.is = Operand::Is::kRegister;
    } else if (parse_number(s, o.number)) {
      o.is = Operand::Is::kNumber;
    } else {
      o.is = s[0] == '%' ? Operand::Is::kSpecial : Operand::Is::kSymbol;
      o.name = trim(s.substr(0, s.find('+')));
      o.offset = offset_of(s);
    }
    return o;
  }

  static int64_t offset_of(const std::string& s) {
    const size_t plus = s.find('+');
    return plus == std::string::npos ? 0 : std::strtoll(trim(s.substr(plus + 1)).c_str(), nullptr, 0);
  }

  Entry& entry_;
  const std::string& text_;
  int line_;
  std::vector<std::map<std::string, int>> scopes_;
};

void parse_parameters(Entry& entry, const std::string& list) {
  for (const std::string& item : split(list, ',')) {
    const std::string s = trim(item);
    if (s.empty()) continue;
    const auto [name, variable] = parse_variable(s);
    const uint32_t offset = (entry.parameter_bytes + variable.alignment - 1) / variable.alignment * variable.alignment;
    entry.parameters.push_back({name, offset, static_cast<uint32_t>(variable.bytes)});
    entry.parameter_bytes = offset + static_cast<uint32_t>(variable.bytes);
  }
}

}  // namespace

Source::Source(std::string text) : text_(std::move(text)) {
  blank_comments(text_);
  int depth = 0;
  std::string declaration;  // of a variable, over lines, until its ';'
  for (size_t i = 0; i < text_.size();) {
    const size_t end = std::min(text_.find('\n', i), text_.size());
    if (!declaration.empty() || depth == 0) {
      const size_t entry = text_.find(".entry", i);
      if (entry < end) {
        size_t name = entry + 6;
        while (std::isspace(static_cast<unsigned char>(text_[name]))) ++name;
        size_t after = name;
        while (name_character(text_[after])) ++after;
        entries_[text_.substr(name, after - name)] = name;
      }
      const std::string line = trim(text_.substr(i, end - i));
      if (starts_with(line, ".file")) {
        const size_t quote = line.find('"'), slash = line.rfind('/');
        const size_t begin = slash == std::string::npos ? quote + 1 : slash + 1;
        files_[std::atoi(line.c_str() + 5)] = line.substr(begin, line.find('"', begin) - begin);
      }
      const bool variable = line.find(".const ") != std::string::npos || line.find(".global ") != std::string::npos ||
                            line.find(".shared ") != std::string::npos;
      if (!declaration.empty() || variable) declaration += line;
      if (!declaration.empty() && declaration.back() == ';') {
        declaration.pop_back();
        variables_.insert(parse_variable(declaration));
        declaration.clear();
        i = end + 1;
        continue;
      }
    }
    if (declaration.empty()) {
      for (; i < end; ++i) depth += (text_[i] == '{') - (text_[i] == '}');
    }
    i = end + 1;
  }
}

Entry Source::parse(const std::string& name) const {
  Entry entry;
  entry.name = name;
  const size_t at = entries_.at(name);
  const size_t body = text_.find('{', at), open = std::min(text_.find('(', at), body);
  const std::string directives = text_.substr(at + name.size(), body - at - name.size());
  if (open < body) parse_parameters(entry, text_.substr(open + 1, text_.find(')', open) - open - 1));
  const size_t maxntid = directives.find(".maxntid");
  if (maxntid != std::string::npos) {
    unsigned x = 1, y = 1, z = 1;
    std::sscanf(directives.c_str() + maxntid, ".maxntid %u, %u, %u", &x, &y, &z);
    entry.max_threads = x * y * z;
  }
  size_t end = body;
  int depth = 0;
  do {
    depth += (text_[end] == '{') - (text_[end] == '}');
    ++end;
  } while (depth > 0 && end < text_.size());
  const std::string text = text_.substr(body, end - body);
  BodyParser(entry, text, 1 + static_cast<int>(std::count(text_.begin(), text_.begin() + body, '\n'))).parse();
  return entry;
}

std::string Source::describe(const Location& location) const {
  const auto name = [&](int file, int line) {
    const auto found = files_.find(file);
    return (found == files_.end() ? "file " + std::to_string(file) : found->second) + ":" + std::to_string(line);
  };
  if (location.file == 0) return "no line information";
  std::string s = name(location.file, location.line);
  if (location.caller_file != 0) s += " (in " + name(location.caller_file, location.caller_line) + ")";
  return s;
}

}  // namespace ptx
