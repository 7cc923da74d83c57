// Which micro-kernels run on this machine.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace lora_ops {

// The table in use: the fastest that this CPU supports, or the one that LORA_OPS_CPU_ISA names. Throws std::runtime_error
// if that name is unknown or not supported here.
const Kernels& kernels();

std::vector<std::string> built_isas();
std::vector<std::string> supported_isas();  // of those, what this CPU can run, fastest first

bool amx_permitted();  // whether the operating system lets this process use AMX (amx.cpp)

void lora_forward(const LoraForward& p);
void lora_backward(const LoraBackward& p);

// Floats of a weight (N, K) in packed panels, and the packing itself (LoraForward::panels).
int64_t packed_size(const Kernels& k, int64_t N, int64_t K, DType x, DType weight);
void pack_weight(const Matrix& weight, int64_t N, int64_t K, DType x, float* panels, int threads);

// words[row][ceil(cols / 128) * 4]: the mask that lora_forward applies, for tests and for reference.py.
void dropout_mask(const Dropout& dropout, int64_t rows, int64_t cols, uint32_t* words);

}  // namespace lora_ops
