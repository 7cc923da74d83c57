// lora_ops._C_cuda: addresses, sizes and a stream in, nothing of torch. lora_ops/cuda/ops.py has checked the arguments.
#include <cuda_runtime_api.h>

#include <vector>

#include "../bindings.h"
#include "dequantize_4bit.h"
#include "lora_backward_down.h"
#include "lora_backward_dx.h"
#include "lora_backward_up.h"
#include "lora_down.h"
#include "lora_forward.h"
#include "qlora_backward_dx.h"
#include "qlora_forward.h"
#include "quantize_4bit.h"

namespace py = pybind11;
using namespace lora_ops;

namespace {

// (address of the seed, threshold, 1 / (1 - p))
DeviceDropout dropout(const py::tuple& t) {
  return {reinterpret_cast<const uint64_t*>(t[0].cast<uintptr_t>()), t[1].cast<uint32_t>(), t[2].cast<float>()};
}

// What lora_ops/qlora_ops.py's Weight.for_kernel() gives.
CudaQuantizedWeight quantized(const py::tuple& t) {
  const auto address = [&](int i) { return t[i].cast<uintptr_t>(); };
  return {pointer<const uint8_t>(address(0)),      pointer<const void>(address(3)),  pointer<const float>(address(4)),
          pointer<const float>(address(5)),        pointer<const float>(address(6)), t[2].cast<int64_t>(),
          static_cast<QuantType>(t[1].cast<int>())};
}

LoraDown lora_down(int64_t M, int64_t K, int64_t r, const py::object& x, const py::object& lora_A, const py::tuple& mask,
                   uintptr_t S, int sm_count) {
  const Matrix rows = matrix(x), A = matrix(lora_A);
  LoraDown op;
  op.M = M, op.K = K, op.r = r;
  op.x = rows.data, op.x_row_stride = rows.row_stride, op.x_dtype = rows.dtype;
  op.lora_A = A.data, op.adapter_dtype = A.dtype;
  op.dropout = dropout(mask);
  op.S = pointer<float>(S);
  op.sm_count = sm_count;
  return op;
}

LoraBackwardUp lora_backward_up(int64_t M, int64_t N, int64_t r, const py::object& dy, const py::object& lora_B, uintptr_t S,
                                float scaling, uintptr_t dS, uintptr_t dB, const py::object& dbias, int sm_count) {
  const Matrix rows = matrix(dy), B = matrix(lora_B), bias = matrix(dbias);
  LoraBackwardUp op;
  op.M = M, op.N = N, op.r = r;
  op.dy = rows.data, op.dy_row_stride = rows.row_stride, op.dy_dtype = rows.dtype;
  op.lora_B = B.data, op.adapter_dtype = B.dtype;
  op.S = pointer<const float>(S);
  op.scaling = scaling;
  op.dS = pointer<float>(dS), op.dB = pointer<void>(dB);
  op.dbias = bias.data, op.dbias_dtype = bias.dtype;
  op.sm_count = sm_count;
  return op;
}

LoraBackwardDown lora_backward_down(int64_t M, int64_t K, int64_t r, uintptr_t dS, const py::object& x, const py::tuple& mask,
                                    const py::object& dA, int sm_count) {
  const Matrix rows = matrix(x), out = matrix(dA);
  LoraBackwardDown op;
  op.M = M, op.K = K, op.r = r;
  op.dS = pointer<const float>(dS);
  op.x = rows.data, op.x_row_stride = rows.row_stride, op.x_dtype = rows.dtype;
  op.dropout = dropout(mask);
  op.dA = out.data, op.adapter_dtype = out.dtype;
  op.sm_count = sm_count;
  return op;
}

// (M, K, N, r, x, weight, lora_B, bias, y, S, scaling, gate, m): the general form. S is a matrix, and so is a gate, whose row
// stride may be 0.
CudaLoraForward lora_forward(const py::tuple& t) {
  const Matrix S = matrix(t[9]), gate = matrix(t[11]);
  CudaLoraForward op{
      t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(), matrix(t[4]),
      matrix(t[5]),         matrix(t[6]),         matrix(t[7]),         matrix(t[8]),         static_cast<const float*>(S.data),
      t[10].cast<float>()};
  op.S_row_stride = S.row_stride;
  op.gate = static_cast<const float*>(gate.data);
  op.gate_row_stride = gate.row_stride;
  op.m = matrix(t[12]);
  return op;
}

// (M, K, N, r, dy, weight, lora_A, dx, dS, mask, gate)
CudaLoraBackwardDx lora_backward_dx(const py::tuple& t) {
  const Matrix dS = matrix(t[8]), gate = matrix(t[10]);
  CudaLoraBackwardDx op{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
                        t[3].cast<int64_t>(), matrix(t[4]),         matrix(t[5]),
                        matrix(t[6]),         matrix(t[7]),         static_cast<const float*>(dS.data),
                        dropout(t[9])};
  op.dS_row_stride = dS.row_stride;
  op.gate = static_cast<const float*>(gate.data);
  op.gate_row_stride = gate.row_stride;
  return op;
}

// (count, address of first_row, address of adapters, aligned)
Segments segments(const py::tuple& t) {
  return {t[0].cast<int>(), pointer<const int32_t>(t[1].cast<uintptr_t>()),
          pointer<const SegmentAdapter>(t[2].cast<uintptr_t>()), t[3].cast<bool>()};
}

// A launch of several ops, each of them a tuple.
template <class Op>
void def_group(py::module_& m, const char* name, Op (*build)(const py::tuple&), void (*launcher)(const Op*, int, void*)) {
  m.def(name, [=](const py::list& ops, uintptr_t stream) {
    std::vector<Op> built;
    for (const py::handle op : ops) built.push_back(build(op.cast<py::tuple>()));
    py::gil_scoped_release release;
    launcher(built.data(), static_cast<int>(built.size()), pointer<void>(stream));
  });
}

// A launch of one op on segments of its rows.
template <class Op>
void def_segments(py::module_& m, const char* name, Op (*build)(const py::tuple&),
                  void (*launcher)(const Op&, const Segments&, void*)) {
  m.def(name, [=](const py::tuple& op, const py::tuple& of, uintptr_t stream) {
    const Op built = build(op);
    const Segments given = segments(of);
    py::gil_scoped_release release;
    launcher(built, given, pointer<void>(stream));
  });
}

// lora_down's own arguments as a tuple.
LoraDown lora_down_of(const py::tuple& t) {
  return lora_down(t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3], t[4], t[5], t[6].cast<uintptr_t>(),
                   t[7].cast<int>());
}

// The workspace of an op: what allocate(bytes) returns, a tensor, is kept by the caller until the launch.
template <class Op>
py::object with_workspace(Op& op, int64_t bytes, const py::object& allocate) {
  if (bytes == 0) return py::none();
  const py::object workspace = allocate(bytes);
  op.workspace = pointer<float>(workspace.attr("data_ptr")().template cast<uintptr_t>());
  return workspace;
}

// The launch of an op whose struct `build` makes. allocate and the stream come after the op's own arguments.
template <class Op, class... Args>
void def_with_workspace(py::module_& m, const char* name, Op (*build)(Args...), void (*launcher)(const Op&, void*)) {
  m.def(name, [=](Args... args, const py::object& allocate, uintptr_t stream) {
    Op op = build(args...);
    const py::object workspace = with_workspace(op, workspace_bytes(op), allocate);
    py::gil_scoped_release release;
    launcher(op, pointer<void>(stream));
  });
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "Compiled CUDA kernels of lora_ops. Not a public interface.";
  // The newest CUDA that the driver supports, 1000 · major + 10 · minor; 0 without a driver.
  m.def("driver_version", [] {
    int version = 0;
    cudaDriverGetVersion(&version);
    return version;
  });

  def_with_workspace(m, "lora_down", lora_down, launch_lora_down);
  def_with_workspace(m, "lora_backward_up", lora_backward_up, launch_lora_backward_up);
  def_with_workspace(m, "lora_backward_down", lora_backward_down, launch_lora_backward_down);

  m.def("lora_down_segments", [](const py::tuple& op, const py::tuple& of, const py::object& allocate, uintptr_t stream) {
    LoraDown built = lora_down_of(op);
    const Segments given = segments(of);
    const py::object workspace = with_workspace(built, workspace_bytes(built, given), allocate);
    py::gil_scoped_release release;
    launch_lora_down_segments(built, given, pointer<void>(stream));
  });

  def_group(m, "lora_forward_group", lora_forward, launch_lora_forward_group);
  def_group(m, "lora_backward_dx_group", lora_backward_dx, launch_lora_backward_dx_group);
  def_segments(m, "lora_forward_segments", lora_forward, launch_lora_forward_segments);
  def_segments(m, "lora_backward_dx_segments", lora_backward_dx, launch_lora_backward_dx_segments);

  m.def("quantize_4bit", [](int64_t N, int64_t K, int quant_type, int64_t blocksize, uintptr_t weight, int dtype,
                            uintptr_t codes, uintptr_t absmax, uintptr_t stream) {
    const CudaQuantize4Bit op{N,
                              K,
                              static_cast<QuantType>(quant_type),
                              blocksize,
                              pointer<const void>(weight),
                              static_cast<DType>(dtype),
                              pointer<uint8_t>(codes),
                              pointer<float>(absmax)};
    py::gil_scoped_release release;
    launch_quantize_4bit(op, pointer<void>(stream));
  });
  m.def("dequantize_4bit", [](int64_t N, int64_t K, py::tuple weight, uintptr_t out, int dtype, uintptr_t stream) {
    const CudaDequantize4Bit op{N, K, quantized(weight), pointer<void>(out), static_cast<DType>(dtype)};
    py::gil_scoped_release release;
    launch_dequantize_4bit(op, pointer<void>(stream));
  });
  m.def("lora_forward", [](int64_t M, int64_t K, int64_t N, int64_t r, py::object x, py::object weight, py::object lora_B,
                           py::object bias, py::object y, uintptr_t S, float scaling, uintptr_t stream) {
    CudaLoraForward op{M,      K, N, r, matrix(x), matrix(weight), matrix(lora_B), matrix(bias), matrix(y), pointer<float>(S),
                       scaling};
    py::gil_scoped_release release;
    launch_lora_forward(op, pointer<void>(stream));
  });
  m.def("qlora_forward", [](int64_t M, int64_t K, int64_t N, int64_t r, py::object x, py::tuple weight, py::object lora_B,
                            py::object bias, py::object y, uintptr_t S, float scaling, uintptr_t stream) {
    CudaQloraForward op{
        M, K, N, r, matrix(x), quantized(weight), matrix(lora_B), matrix(bias), matrix(y), pointer<float>(S), scaling};
    py::gil_scoped_release release;
    launch_qlora_forward(op, pointer<void>(stream));
  });
  m.def("lora_backward_dx", [](int64_t M, int64_t K, int64_t N, int64_t r, py::object dy, py::object weight, py::object lora_A,
                               py::object dx, uintptr_t dS, py::tuple mask, uintptr_t stream) {
    CudaLoraBackwardDx op{
        M, K, N, r, matrix(dy), matrix(weight), matrix(lora_A), matrix(dx), pointer<float>(dS), dropout(mask)};
    py::gil_scoped_release release;
    launch_lora_backward_dx(op, pointer<void>(stream));
  });
  m.def("qlora_backward_dx", [](int64_t M, int64_t K, int64_t N, int64_t r, py::object dy, py::tuple weight, py::object lora_A,
                                py::object dx, uintptr_t dS, py::tuple mask, uintptr_t stream) {
    CudaQloraBackwardDx op{
        M, K, N, r, matrix(dy), quantized(weight), matrix(lora_A), matrix(dx), pointer<float>(dS), dropout(mask)};
    py::gil_scoped_release release;
    launch_qlora_backward_dx(op, pointer<void>(stream));
  });
}
