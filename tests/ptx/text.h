// Small things about text that parsing is made of.
#pragma once

#include <cctype>
#include <cstring>
#include <string>
#include <vector>

namespace ptx {

inline bool name_character(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}
inline std::string trim(const std::string& s) {
  const size_t first = s.find_first_not_of(" \t\r\n"), last = s.find_last_not_of(" \t\r\n");
  return first == std::string::npos ? "" : s.substr(first, last - first + 1);
}
// Splits where no bracket is open.
inline std::vector<std::string> split(const std::string& s, char separator) {
  std::vector<std::string> items(1);
  int depth = 0;
  for (const char c : s) {
    depth += (c == '[' || c == '{' || c == '(') - (c == ']' || c == '}' || c == ')');
    if (c == separator && depth == 0) {
      items.emplace_back();
    } else {
      items.back() += c;
    }
  }
  return items;
}
inline bool starts_with(const std::string& s, const char* prefix, size_t at = 0) {
  return s.compare(at, std::strlen(prefix), prefix) == 0;
}
// The number after `word`, or `otherwise`.
inline uint64_t number_after(const std::string& s, const char* word, uint64_t otherwise) {
  const size_t at = s.find(word);
  return at == std::string::npos ? otherwise : std::strtoull(s.c_str() + at + std::strlen(word), nullptr, 0);
}

}  // namespace ptx
