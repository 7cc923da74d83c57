// Every function that Python can call: addresses and sizes in, nothing of torch. lora_ops/ops.py has checked the arguments.
#include "bindings.h"

#include <pybind11/stl.h>

#include <array>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/dispatch.h"
#include "cpu/quantize.h"
#include "released.h"

namespace py = pybind11;
using namespace lora_ops;

namespace {

// (codes, quant type, blocksize, absmax, nested_absmax, nested_code, offset), addresses and numbers, for a weight in 4 bits;
// a matrix or None for one that is not.
QuantizedWeight quantized(const py::object& o, int64_t K) {
  if (o.is_none()) return {};
  const auto t = o.cast<py::tuple>();
  if (t.size() != 7) return {};
  const auto at = [&](int i) { return reinterpret_cast<void*>(t[i].cast<uintptr_t>()); };
  QuantizedWeight w;
  w.K = K;
  w.codes = static_cast<const uint8_t*>(at(0));
  w.values = code_table(static_cast<QuantType>(t[1].cast<int>())).values;
  w.blocksize = t[2].cast<int64_t>();
  w.absmax = at(3);
  w.nested_absmax = static_cast<const float*>(at(4));
  w.nested_code = static_cast<const float*>(at(5));
  if (w.nested_code) w.offset = *static_cast<const float*>(at(6));
  return w;
}

FourBit four_bit(int64_t N, int64_t K, int quant_type, int64_t blocksize, uintptr_t codes, uintptr_t absmax) {
  return {N, K, static_cast<QuantType>(quant_type), blocksize, pointer<uint8_t>(codes), pointer<float>(absmax)};
}

// Addresses of A, B, dA and dB, contiguous or 0, and the rank, of each; scalings. Throws std::invalid_argument for an id
// without an adapter.
struct Mixed {
  std::vector<Adapter> adapters;
  MixedBatch batch;

  Mixed(int64_t K, const std::vector<std::array<int64_t, 5>>& given, const std::vector<float>& scalings, int dtype,
        uintptr_t ids, int64_t M) {
    const auto of = [&](int64_t address, int64_t cols) {
      return Matrix{reinterpret_cast<void*>(address), cols, 1, static_cast<DType>(dtype)};
    };
    adapters.reserve(given.size());
    for (const auto& [A, B, dA, dB, r] : given)
      adapters.push_back({r, of(A, K), of(B, r), scalings.at(adapters.size()), of(dA, K), of(dB, r)});
    batch = {adapters.data(), static_cast<int64_t>(adapters.size()), pointer<const int64_t>(ids)};
    for (int64_t i = 0; i < M; ++i) {
      if (batch.ids[i] >= -1 && batch.ids[i] < batch.count) continue;
      throw std::invalid_argument("adapter_ids must be -1 or the index of an adapter, below " + std::to_string(batch.count) +
                                  ", got " + std::to_string(batch.ids[i]));
    }
  }
};

// (gate, its row stride, core, out_scale, z, then of the backward dgate, dcore, dout_scale), addresses and matrices; or None.
template <class Params>
void set_general(Params& p, const py::object& o) {
  if (o.is_none()) return;
  const auto t = o.cast<py::tuple>();
  const auto at = [&](int i) { return pointer<float>(t[i].cast<uintptr_t>()); };
  p.middle = {at(0), t[1].cast<int64_t>(), matrix(t[2])};
  p.out_scale = at(3);
  p.z = matrix(t[4]);
  if constexpr (std::is_same_v<Params, LoraBackward>) p.dgate = at(5), p.dcore = at(6), p.dout_scale = at(7);
}

Dropout dropout(uint64_t seed, uint32_t threshold, float keep_scale) {
  return {seed, threshold, keep_scale};
}

// As Python sees it; elsewhere nobody looks for signals during a call.
#if defined(__linux__)
bool on_main_thread() {
  return syscall(SYS_gettid) == getpid();
}
#else
bool on_main_thread() {
  return false;
}
#endif

}  // namespace

bool lora_ops::no_signal_raised() {
  if (!on_main_thread()) return true;
  py::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() == 0;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of lora_ops. Not a public interface.";

  m.def("lora_forward", [](int64_t M, int64_t K, int64_t N, int64_t r, py::object x, py::object weight, uintptr_t panels,
                           py::object lora_A, py::object lora_B, py::object bias, float scaling, uint64_t seed,
                           uint32_t threshold, float keep_scale, py::object y, uintptr_t S, int threads, py::object general) {
    LoraForward p{M,
                  K,
                  N,
                  r,
                  matrix(x),
                  matrix(weight),
                  quantized(weight, K),
                  pointer<const float>(panels),
                  matrix(lora_A),
                  matrix(lora_B),
                  matrix(bias),
                  scaling,
                  dropout(seed, threshold, keep_scale),
                  matrix(y),
                  pointer<float>(S),
                  threads};
    set_general(p, general);
    released([&] { lora_forward(p); });
  });

  m.def("lora_backward",
        [](int64_t M, int64_t K, int64_t N, int64_t r, py::object dy, py::object x, py::object weight, py::object lora_A,
           py::object lora_B, uintptr_t S, float scaling, uint64_t seed, uint32_t threshold, float keep_scale, py::object dx,
           py::object dA, py::object dB, py::object dbias, int threads, py::object general) {
          LoraBackward p{M,
                         K,
                         N,
                         r,
                         matrix(dy),
                         matrix(x),
                         matrix(weight),
                         quantized(weight, K),
                         matrix(lora_A),
                         matrix(lora_B),
                         pointer<const float>(S),
                         scaling,
                         dropout(seed, threshold, keep_scale),
                         matrix(dx),
                         matrix(dA),
                         matrix(dB),
                         matrix(dbias),
                         threads};
          set_general(p, general);
          released([&] { lora_backward(p); });
        });

  bind_tensor_calls(m);

  // Rows with an adapter each: as above, without one A, B and scaling, and r the largest rank.
  m.def("multi_lora_forward",
        [](int64_t M, int64_t K, int64_t N, int64_t r, py::object x, py::object weight,
           const std::vector<std::array<int64_t, 5>>& adapters, const std::vector<float>& scalings, int dtype, uintptr_t ids,
           py::object bias, uint64_t seed, uint32_t threshold, float keep_scale, py::object y, uintptr_t S, int threads) {
          const Mixed mixed(K, adapters, scalings, dtype, ids, M);
          LoraForward p{M,
                        K,
                        N,
                        r,
                        matrix(x),
                        matrix(weight),
                        quantized(weight, K),
                        nullptr,
                        {},
                        {},
                        matrix(bias),
                        1.f,
                        dropout(seed, threshold, keep_scale),
                        matrix(y),
                        pointer<float>(S),
                        threads,
                        mixed.batch};
          released([&] { lora_forward(p); });
        });
  m.def("multi_lora_backward",
        [](int64_t M, int64_t K, int64_t N, int64_t r, py::object dy, py::object x, py::object weight,
           const std::vector<std::array<int64_t, 5>>& adapters, const std::vector<float>& scalings, int dtype, uintptr_t ids,
           uintptr_t S, uint64_t seed, uint32_t threshold, float keep_scale, py::object dx, py::object dbias, int threads) {
          const Mixed mixed(K, adapters, scalings, dtype, ids, M);
          LoraBackward p{M,
                         K,
                         N,
                         r,
                         matrix(dy),
                         matrix(x),
                         matrix(weight),
                         quantized(weight, K),
                         {},
                         {},
                         pointer<const float>(S),
                         1.f,
                         dropout(seed, threshold, keep_scale),
                         matrix(dx),
                         {},
                         {},
                         matrix(dbias),
                         threads,
                         mixed.batch};
          released([&] { lora_backward(p); });
        });

  m.def("packed_size", [](int64_t N, int64_t K, int x, int weight) {
    return packed_size(kernels(), N, K, static_cast<DType>(x), static_cast<DType>(weight));
  });
  m.def("pack_weight", [](int64_t N, int64_t K, py::object weight, int x, uintptr_t panels, int threads) {
    const Matrix w = matrix(weight);
    released([&] { pack_weight(w, N, K, static_cast<DType>(x), pointer<float>(panels), threads); });
  });
  m.def("dropout_mask", [](int64_t rows, int64_t cols, uint64_t seed, uint32_t threshold, uintptr_t words) {
    dropout_mask(dropout(seed, threshold, 1.f), rows, cols, pointer<uint32_t>(words));
  });

  // 4-bit weights: codes (N, row_bytes(K)) in the kernels' layout, absmax fp32, weight (N, K) and packed contiguous.
  m.def("row_bytes", &row_bytes);
  m.def("quantize_4bit", [](int64_t N, int64_t K, int quant_type, int64_t blocksize, uintptr_t codes, uintptr_t absmax,
                            uintptr_t weight, int dtype, int threads) {
    const FourBit w = four_bit(N, K, quant_type, blocksize, codes, absmax);
    return released([&] { return quantize_4bit(w, pointer<const void>(weight), static_cast<DType>(dtype), threads); });
  });
  m.def("dequantize_4bit", [](int64_t N, int64_t K, int quant_type, int64_t blocksize, uintptr_t codes, uintptr_t absmax,
                              uintptr_t weight, int dtype, int threads) {
    const FourBit w = four_bit(N, K, quant_type, blocksize, codes, absmax);
    released([&] { dequantize_4bit(w, pointer<void>(weight), static_cast<DType>(dtype), threads); });
  });
  m.def("to_bitsandbytes", [](int64_t N, int64_t K, int quant_type, uintptr_t codes, uintptr_t packed, int threads) {
    const FourBit w = four_bit(N, K, quant_type, 0, codes, 0);
    released([&] { to_bitsandbytes(w, pointer<uint8_t>(packed), threads); });
  });
  m.def("from_bitsandbytes", [](int64_t N, int64_t K, int quant_type, uintptr_t codes, uintptr_t packed, int threads) {
    const FourBit w = four_bit(N, K, quant_type, 0, codes, 0);
    released([&] { from_bitsandbytes(w, pointer<const uint8_t>(packed), threads); });
  });

  // The bench's bounds: run `iterations` of the widest multiply-add loop of an arithmetic (its flops are returned), or read
  // memory in order.
  m.def("multiply_adds", [](bool bf16, int64_t iterations) {
    const Kernels& k = kernels();
    const Arithmetic& arithmetic = bf16 && k.bf16.tile ? k.bf16 : k.f32;
    py::gil_scoped_release release;
    arithmetic.multiply_adds(iterations);
    return iterations * arithmetic.rows * 2 * k.lanes * 2 * arithmetic.k_per_step;
  });
  m.def("read_all", [](uintptr_t address, int64_t count) {
    py::gil_scoped_release release;
    return kernels().read_all(pointer<const float>(address), count);
  });

  m.def("isa", [] { return std::string(kernels().name); });
  m.def("built_isas", &built_isas);
  m.def("supported_isas", &supported_isas);
  m.attr("compiler") = std::string(
#if defined(__clang__)
      "clang "
#elif defined(__GNUC__)
      "gcc "
#endif
      __VERSION__);
}
