// What the checkers have seen: each kind once per instruction, with how often.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>

namespace ptx {

class Reports {
 public:
  // Counts the report; its text, or null where it has one already.
  std::string* add(const std::string& kind, const void* where) {
    Report& report = reports_[{kind, where}];
    return report.times++ == 0 ? &report.text : nullptr;
  }
  void clear() { reports_.clear(); }
  std::string text() const {
    std::string all;
    for (const auto& [key, report] : reports_) {
      all += key.first + ": " + report.text + " (" + std::to_string(report.times) + " times)\n";
    }
    return all;
  }

 private:
  struct Report {
    uint64_t times = 0;
    std::string text;
  };
  std::map<std::pair<std::string, const void*>, Report> reports_;
};

}  // namespace ptx
