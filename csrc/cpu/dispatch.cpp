#include "dispatch.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace lora_ops {
namespace {

struct Isa {
  const Kernels* table;
  bool supported;
};

#if defined(__x86_64__)
// vdpbf16ps does the work of two fp32 multiply-adds. On AMD's cores it is issued as often as one, on Intel's server cores
// (which want bf16 products to use AMX) less than a quarter as often: there, widening to fp32 is twice as fast. Nothing in
// cpuid tells, so ask the clock: the two differ by a factor of four either way.
template <class F>
double best_seconds(const F& body) {
  double best = 1e9;
  for (int i = 0; i < 20; ++i) {
    const auto start = std::chrono::steady_clock::now();
    body();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

bool bf16_outruns_f32() {
  alignas(64) static float left[256 * 16], panel[256 * 32], c[kMaxTile];
  const double f32 =
      best_seconds([] { kAvx512Bf16.f32.tile(kAvx512Bf16.f32.rows, 2, left, panel, 128 * 16, 128, c, false, kNothingAhead); });
  const double bf16 = best_seconds(
      [] { kAvx512Bf16.bf16.tile(kAvx512Bf16.bf16.rows, 2, left, panel, 128 * 16, 128, c, false, kNothingAhead); });
  return bf16 < 1.5 * f32;  // per step, which is two k in bf16
}

bool cpu_has_amx() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & (1u << 22)) && (d & (1u << 24));  // AMX-BF16, AMX-TILE
}
#endif

// Fastest first.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> list = [] {
    std::vector<Isa> all;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    const bool amx = bf16 && cpu_has_amx() && amx_permitted();
    const Isa with_bf16{&kAvx512Bf16, bf16}, without{&kAvx512, avx512};
    all.push_back({&kAmx, amx});
    if (bf16 && !bf16_outruns_f32()) {
      all.insert(all.end(), {without, with_bf16});
    } else {
      all.insert(all.end(), {with_bf16, without});
    }
    all.push_back({&kAvx2, avx2});
#endif
    all.push_back({&kGeneric, true});
    return all;
  }();
  return list;
}

const Kernels& choose() {
  const char* forced = std::getenv("LORA_OPS_CPU_ISA");
  std::string supported;
  for (const Isa& isa : isas()) {
    if (!isa.supported) continue;
    if (!forced || !*forced || std::strcmp(forced, isa.table->name) == 0) return *isa.table;
    supported += std::string(supported.empty() ? "" : ", ") + isa.table->name;
  }
  throw std::runtime_error(std::string("LORA_OPS_CPU_ISA is \"") + forced + "\"; this machine runs: " + supported);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.emplace_back(isa.table->name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.supported) names.emplace_back(isa.table->name);
  return names;
}

}  // namespace lora_ops
