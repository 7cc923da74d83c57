// What the fake CUDA runtime and Python see of the executor: one device, its modules, its memory, its reports.
//
// The device's memory is the process's own, so that a kernel's pointers are the host's; but only registered buffers may be
// touched, within their exact bounds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace ptx {

struct Geometry {
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t dynamic_shared_bytes;
};

struct KernelLimits {
  uint32_t max_threads;  // .maxntid, or what every architecture allows
  uint32_t static_shared_bytes;
};

// Throws std::runtime_error where no module has this entry, or where it has an instruction that is not implemented.
KernelLimits kernel_limits(const std::string& entry);

// arguments: a pointer to each parameter's bytes. Runs to the end; what the checkers see is kept as reports. Throws where the
// kernel cannot be executed.
void launch(const std::string& entry, const Geometry& geometry, const void* const* arguments);

// A misuse that no kernel is to blame for, such as a launch with an over-large grid.
void report(const std::string& kind, const std::string& message);

}  // namespace ptx

// All text is UTF-8 and stays valid until the next call of the same function.
extern "C" {
// The architecture whose limits hold: 80, 86, 89, 90, 100 or 120.
void ptx_set_architecture(int architecture);
int ptx_architecture();

// Adds a module, or replaces the one of the same name. 0, or 1 with the reason in ptx_error().
int ptx_load_module(const char* name, const char* text);
const char* ptx_error();

// A buffer of the device; bytes that are not `initialised` may not be read before they are written.
void ptx_register_buffer(const void* data, uint64_t bytes, int readonly, int initialised);
// The host wrote these bytes of a registered buffer.
void ptx_initialise(const void* data, uint64_t bytes);

// 1: blocks and warps run in descending order. What a kernel computes must not depend on it.
void ptx_set_reverse_order(int reverse);
// Forgets buffers, reports and counters; modules stay.
void ptx_reset();

// A launch without host code. 0, or 1 with the reason in ptx_error().
int ptx_launch(const char* entry, const uint32_t grid[3], const uint32_t block[3], uint32_t dynamic_shared_bytes,
               const void* const* arguments);

// One line per distinct report: kind, .cu file:line, message, how often.
const char* ptx_reports();
// One line per instruction that ran, tab-separated:
// entry, PTX line, .cu file:line, opcode, executions, wavefronts, ideal wavefronts, sectors, ideal sectors, global bytes.
const char* ptx_counters();
// One line per launch, tab-separated: entry, grid x, y, z, block x, y, z, bytes of shared memory, static and dynamic.
const char* ptx_launches();
// One line per launch and buffer that it touched, tab-separated: entry, address of the buffer, bytes read and bytes written by
// all accesses, bytes read and bytes written at least once.
const char* ptx_traffic();
}
