// The ops on tensors as they come (tensors.h): what fits is done, without a question asked in Python.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "nf4.h"
#include "released.h"
#include "tensors.h"

namespace py = pybind11;

namespace lora_ops {
namespace {

// (seed, threshold, keep_scale) of ops.py's _dropout
Dropout dropout(const py::tuple& t) {
  return {t[0].cast<uint64_t>(), t[1].cast<uint32_t>(), t[2].cast<float>()};
}

// A weight: (weight,), or Weight's fields (lora_ops/qlora_ops.py), whose scales have been checked.
struct AnyWeight {
  Matrix dense = {};
  QuantizedWeight quantized = {};
  int64_t N = 0, K = 0;

  // `K`: of a weight in 4 bits, whose codes do not tell it.
  AnyWeight(Tensors& tensors, const py::tuple& t, int64_t K_, DType x) : K(K_) {
    if (t.size() == 1) {
      dense = tensors.matrix(t[0], N, K);
      tensors.beside(x, dense.dtype);
      tensors.require(K == K_);
      return;
    }
    QuantizedWeight& w = quantized;
    int64_t rows = 0, count = 0;
    w.K = K;
    w.codes = static_cast<const uint8_t*>(tensors.elements(t[0], kUnsigned, 8, N, count));
    tensors.require(count == N * row_bytes(K));
    const bool nested = !t[2].is_none();
    w.absmax = tensors.elements(t[1], nested ? kUnsigned : kFloat, nested ? 8 : 32, rows, count);
    if (nested) {
      w.nested_absmax = static_cast<const float*>(tensors.elements(t[2], kFloat, 32, rows, count));
      w.nested_code = static_cast<const float*>(tensors.elements(t[3], kFloat, 32, rows, count));
      const auto* offset = static_cast<const float*>(tensors.elements(t[4], kFloat, 32, rows, count));
      if (offset) w.offset = *offset;
    }
    w.blocksize = t[5].cast<int64_t>();
    w.values = code_table(t[6].cast<std::string>() == "nf4" ? QuantType::nf4 : QuantType::fp4).values;
  }
};

// A (r, K) and B (N, r) beside x.
void factors(Tensors& tensors, const py::object& lora_A, const py::object& lora_B, DType x, int64_t K, int64_t N, int64_t& r,
             Matrix& A, Matrix& B) {
  int64_t of[3] = {};
  A = tensors.matrix(lora_A, r, of[0]);
  B = tensors.matrix(lora_B, of[1], of[2]);
  tensors.require(of[0] == K && of[1] == N && of[2] == r && A.col_stride == 1 && B.col_stride == 1 && A.dtype == B.dtype);
  tensors.beside(x, A.dtype);
}

void bias_of(Tensors& tensors, const py::object& bias, DType x, int64_t N, Matrix& out) {
  if (bias.is_none()) return;
  int64_t count = 0;
  out = tensors.vector(bias, count);
  tensors.require(count == N);
  tensors.beside(x, out.dtype);
}

// (y, S) of what fits.
py::object run_forward(const Tensors& tensors, LoraForward& p, const py::object& x, const py::tuple& drop, int threads) {
  p.dropout = dropout(drop);
  p.threads = threads;
  py::object y = tensors.new_like(x, p.N, p.x.dtype), S = tensors.new_matrix(p.M, p.r, DType::f32);
  p.y = {tensors.address(y), p.N, 1, p.x.dtype};
  p.S = static_cast<float*>(tensors.address(S));
  released([&] { lora_forward(p); });
  return py::make_tuple(y, S);
}

py::object forward(const py::object& x, const py::tuple& weight, const py::object& lora_A, const py::object& lora_B,
                   const py::object& bias, const py::object& panels, const py::tuple& drop, double scaling, double dropout_p,
                   int threads) {
  Tensors tensors;
  LoraForward p{};
  p.x = tensors.rows(x, p.M, p.K);
  const DType dtype = p.x.dtype;
  const AnyWeight w(tensors, weight, p.K, dtype);
  p.N = w.N, p.weight = w.dense, p.quantized = w.quantized;
  factors(tensors, lora_A, lora_B, dtype, p.K, p.N, p.r, p.lora_A, p.lora_B);
  bias_of(tensors, bias, dtype, p.N, p.bias);
  tensors.require(std::isfinite(scaling) && dropout_p >= 0 && dropout_p < 1);
  if (!panels.is_none() && tensors.fit()) {
    int64_t rows = 0, count = 0;
    p.panels = static_cast<const float*>(tensors.elements(panels, kFloat, 32, rows, count));
    tensors.require(count == packed_size(kernels(), p.N, p.K, dtype, p.weight.dtype));
  }
  if (!tensors.fit()) return py::none();

  p.scaling = static_cast<float>(scaling);
  return run_forward(tensors, p, x, drop, threads);
}

py::object backward(const py::object& dy, const py::object& x, const py::tuple& weight, const py::object& lora_A,
                    const py::object& lora_B, const py::object& S, const py::tuple& drop, double scaling,
                    const std::array<bool, 4>& need, int threads) {
  const auto [need_dx, need_dA, need_dB, need_dbias] = need;
  Tensors tensors;
  LoraBackward p{};
  p.dy = tensors.rows(dy, p.M, p.N);
  const DType dtype = p.dy.dtype;
  tensors.matrix(lora_A, p.r, p.K);
  factors(tensors, lora_A, lora_B, dtype, p.K, p.N, p.r, p.lora_A, p.lora_B);
  const AnyWeight w(tensors, weight, p.K, dtype);
  tensors.require(w.N == p.N);
  if (need_dx) p.weight = w.dense, p.quantized = w.quantized;
  if (need_dA) {
    int64_t rows = 0, cols = 0;
    p.x = tensors.rows(x, rows, cols);
    tensors.require(rows == p.M && cols == p.K);
  }
  if (need_dB) {
    int64_t rows = 0, count = 0;
    p.S = static_cast<const float*>(tensors.elements(S, kFloat, 32, rows, count));
    tensors.require(count == p.M * p.r);
  }
  if (!tensors.fit()) return py::none();

  p.scaling = static_cast<float>(scaling);
  p.dropout = dropout(drop);
  p.threads = threads;
  const DType of_adapter = p.lora_A.dtype;
  py::object dx = need_dx ? tensors.new_like(dy, p.K, dtype) : tensors.new_vector(0, dtype);
  py::object dA = need_dA ? tensors.new_matrix(p.r, p.K, of_adapter) : tensors.new_vector(0, of_adapter);
  py::object dB = need_dB ? tensors.new_matrix(p.N, p.r, of_adapter) : tensors.new_vector(0, of_adapter);
  py::object dbias = tensors.new_vector(need_dbias ? p.N : 0, DType::f32);
  if (need_dx) p.dx = {tensors.address(dx), p.K, 1, dtype};
  if (need_dA) p.dA = {tensors.address(dA), p.K, 1, of_adapter};
  if (need_dB) p.dB = {tensors.address(dB), p.r, 1, of_adapter};
  if (need_dbias) p.dbias = {tensors.address(dbias), 0, 1, DType::f32};
  released([&] { lora_backward(p); });
  return py::make_tuple(dx, dA, dB, dbias);
}

// `scalings` (adapters) in fp64, `ids` (M): which of them a row has, or -1.
py::object multi_forward(const py::object& x, const py::tuple& weight, const std::vector<py::object>& lora_A,
                         const std::vector<py::object>& lora_B, const py::object& scalings, const py::object& ids,
                         const py::object& bias, const py::tuple& drop, double dropout_p, int threads) {
  Tensors tensors;
  LoraForward p{};
  p.x = tensors.rows(x, p.M, p.K);
  const DType dtype = p.x.dtype;
  const AnyWeight w(tensors, weight, p.K, dtype);
  p.N = w.N, p.weight = w.dense, p.quantized = w.quantized;
  const auto count = static_cast<int64_t>(lora_A.size());
  int64_t rows = 0, elements = 0;
  const auto* scaling = static_cast<const double*>(tensors.elements(scalings, kFloat, 64, rows, elements));
  tensors.require(elements == count && static_cast<int64_t>(lora_B.size()) == count);
  p.mixed.ids = static_cast<const int64_t*>(tensors.elements(ids, kInt, 64, rows, elements));
  tensors.require(elements == p.M && count > 0);
  std::vector<Adapter> adapters(static_cast<size_t>(tensors.fit() ? count : 0));
  for (size_t i = 0; i < adapters.size() && tensors.fit(); ++i) {
    Adapter& a = adapters[i];
    factors(tensors, lora_A[i], lora_B[i], dtype, p.K, p.N, a.r, a.lora_A, a.lora_B);
    a.scaling = static_cast<float>(scaling[i]);
    tensors.require(a.lora_A.dtype == adapters[0].lora_A.dtype && a.lora_A.row_stride == p.K && a.lora_B.row_stride == a.r);
    p.r = std::max(p.r, a.r);
  }
  for (int64_t i = 0; i < p.M && tensors.fit(); ++i) tensors.require(p.mixed.ids[i] >= -1 && p.mixed.ids[i] < count);
  bias_of(tensors, bias, dtype, p.N, p.bias);
  tensors.require(dropout_p >= 0 && dropout_p < 1);
  if (!tensors.fit()) return py::none();

  p.mixed.adapters = adapters.data(), p.mixed.count = count;
  p.scaling = 1.f;
  return run_forward(tensors, p, x, drop, threads);
}

}  // namespace

void bind_tensor_calls(py::module_& m) {
  m.def("use_tensors", &use_tensors);
  m.def("forward_of_tensors", &forward);
  m.def("backward_of_tensors", &backward);
  m.def("multi_forward_of_tensors", &multi_forward);
}

}  // namespace lora_ops
