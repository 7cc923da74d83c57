// The one device of the process: modules by name, their kernels decoded at first use.
#include "executor.h"

#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "decode.h"
#include "machine.h"

namespace ptx {

namespace {

struct Loaded {
  Kernel kernel;
  std::vector<Counts> counts;  // per instruction
};

struct Module {
  explicit Module(const char* text) : source(text) {}

  Source source;
  std::map<std::string, std::vector<uint64_t>> storage;  // of .global and .const variables
  GlobalVariables globals;
  std::map<std::string, Loaded> kernels;
};

struct Device {
  std::map<std::string, std::unique_ptr<Module>> modules;
  GlobalMemory memory;
  Reports reports;
  int architecture = 80;
  bool reverse = false;
  uint64_t launches = 0;
  std::string error, reports_text, counters_text, launches_text, traffic_text;

  Loaded& find(const std::string& entry) {
    for (auto& [name, module] : modules) {
      const auto loaded = module->kernels.find(entry);
      if (loaded != module->kernels.end()) return loaded->second;
      if (!module->source.has(entry)) continue;
      Loaded fresh{decode(module->source, module->source.parse(entry), module->globals), {}};
      fresh.counts.resize(fresh.kernel.code.size());
      return module->kernels.emplace(entry, std::move(fresh)).first->second;
    }
    fail("no module has the entry " + entry);
  }

  void record(const std::string& entry, const Geometry& geometry, uint32_t static_shared_bytes) {
    launches_text += entry;
    for (const uint32_t n : geometry.grid) launches_text += "\t" + std::to_string(n);
    for (const uint32_t n : geometry.block) launches_text += "\t" + std::to_string(n);
    launches_text += "\t" + std::to_string(static_shared_bytes + geometry.dynamic_shared_bytes) + "\n";
    for (const auto& [address, buffer] : memory.buffers()) {
      if (buffer.launch != launches) continue;
      traffic_text += entry;
      for (const uint64_t n : {address, buffer.read, buffer.written, buffer.distinct(buffer.readers),
                               buffer.distinct(buffer.writers)}) {
        traffic_text += "\t" + std::to_string(n);
      }
      traffic_text += "\n";
    }
  }

  void add_variables(Module& module) {
    for (const auto& [name, variable] : module.source.variables()) {
      if (variable.space == Space::kShared) continue;
      std::vector<uint64_t>& storage = module.storage[name];
      storage.resize((variable.bytes + 7) / 8);
      std::memcpy(storage.data(), variable.initial.data(), variable.bytes);
      module.globals[name] = reinterpret_cast<uint64_t>(storage.data());
      memory.add(storage.data(), variable.bytes, variable.space == Space::kConst, true);
    }
  }
};

Device& device() {
  static Device instance;
  return instance;
}

// What a C function makes of an exception.
template <class F>
int guarded(F f) {
  try {
    f();
    return 0;
  } catch (const std::exception& e) {
    device().error = e.what();
    return 1;
  }
}

}  // namespace

KernelLimits kernel_limits(const std::string& entry) {
  const Kernel& kernel = device().find(entry).kernel;
  return {kernel.max_threads, kernel.static_shared_bytes};
}

void launch(const std::string& entry, const Geometry& geometry, const void* const* arguments) {
  Device& d = device();
  Loaded& loaded = d.find(entry);
  std::vector<uint8_t> parameters(loaded.kernel.parameter_bytes);
  for (size_t i = 0; i < loaded.kernel.parameters.size(); ++i) {
    const Parameter& p = loaded.kernel.parameters[i];
    std::memcpy(&parameters[p.offset], arguments[i], p.bytes);
  }
  Machine(loaded.kernel, geometry, parameters.data(), d.memory, d.reports, loaded.counts, ++d.launches, d.reverse).run();
  d.record(entry, geometry, loaded.kernel.static_shared_bytes);
}

void report(const std::string& kind, const std::string& message) {
  std::string* const text = device().reports.add(kind + ", " + message, nullptr);
  if (text != nullptr) *text = "on the host";
}

}  // namespace ptx

using ptx::device;

void ptx_set_architecture(int architecture) {
  device().architecture = architecture;
}
int ptx_architecture() {
  return device().architecture;
}

int ptx_load_module(const char* name, const char* text) {
  return ptx::guarded([&] {
    auto module = std::make_unique<ptx::Module>(text);
    device().add_variables(*module);
    device().modules[name] = std::move(module);
  });
}
const char* ptx_error() {
  return device().error.c_str();
}

void ptx_register_buffer(const void* data, uint64_t bytes, int readonly, int initialised) {
  device().memory.add(const_cast<void*>(data), bytes, readonly != 0, initialised != 0);
}
void ptx_initialise(const void* data, uint64_t bytes) {
  device().memory.initialise(data, bytes);
}

void ptx_set_reverse_order(int reverse) {
  device().reverse = reverse != 0;
}

void ptx_reset() {
  device().memory.clear();
  device().reports.clear();
  device().launches_text.clear();
  device().traffic_text.clear();
  for (auto& [name, module] : device().modules) {
    device().add_variables(*module);
    for (auto& [entry, loaded] : module->kernels) loaded.counts.assign(loaded.counts.size(), {});
  }
}

int ptx_launch(const char* entry, const uint32_t grid[3], const uint32_t block[3], uint32_t dynamic_shared_bytes,
               const void* const* arguments) {
  return ptx::guarded([&] {
    ptx::launch(entry, {{grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, dynamic_shared_bytes}, arguments);
  });
}

const char* ptx_reports() {
  device().reports_text = device().reports.text();
  return device().reports_text.c_str();
}

const char* ptx_launches() {
  return device().launches_text.c_str();
}

const char* ptx_traffic() {
  return device().traffic_text.c_str();
}

const char* ptx_counters() {
  std::string& text = device().counters_text;
  text.clear();
  for (const auto& [name, module] : device().modules) {
    for (const auto& [entry, loaded] : module->kernels) {
      for (size_t i = 0; i < loaded.counts.size(); ++i) {
        const ptx::Counts& c = loaded.counts[i];
        if (c.executions == 0) continue;
        const ptx::Instruction& in = loaded.kernel.code[i];
        text += entry + "\t" + std::to_string(in.ptx_line) + "\t" + in.source + "\t" + in.opcode;
        for (const uint64_t n : {c.executions, c.wavefronts, c.ideal_wavefronts, c.sectors, c.ideal_sectors, c.global_bytes}) {
          text += "\t" + std::to_string(n);
        }
        text += "\n";
      }
    }
  }
  return text.c_str();
}
