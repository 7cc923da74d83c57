// lora_ops._C_cuda: addresses, sizes and a stream in, nothing of torch. lora_ops/cuda/ops.py has checked the arguments.
#include <cuda_runtime_api.h>

#include "../bindings.h"
#include "dequantize_4bit.h"
#include "lora_backward_down.h"
#include "lora_backward_dx.h"
#include "lora_backward_up.h"
#include "lora_down.h"
#include "lora_forward.h"
#include "qlora_backward_dx.h"
#include "qlora_forward.h"

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

// Two functions of an op whose struct `build` makes: how many bytes of workspace it takes, and its launch, which takes the
// workspace and the stream after the op's own arguments.
template <class Op, class... Args>
void def_with_workspace(py::module_& m, const char* name, Op (*build)(Args...), void (*launcher)(const Op&, void*)) {
  m.def((std::string(name) + "_workspace").c_str(), [=](Args... args) { return workspace_bytes(build(args...)); });
  m.def(name, [=](Args... args, uintptr_t workspace, uintptr_t stream) {
    Op op = build(args...);
    op.workspace = pointer<float>(workspace);
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

  m.def("dequantize_4bit",
        [](int64_t N, int64_t K, int quant_type, int64_t blocksize, uintptr_t codes, uintptr_t absmax, uintptr_t nested_absmax,
           uintptr_t nested_code, uintptr_t offset, uintptr_t weight, int dtype, uintptr_t stream) {
          const CudaDequantize4Bit op{N,
                                      K,
                                      static_cast<QuantType>(quant_type),
                                      blocksize,
                                      pointer<const uint8_t>(codes),
                                      pointer<const void>(absmax),
                                      pointer<const float>(nested_absmax),
                                      pointer<const float>(nested_code),
                                      pointer<const float>(offset),
                                      pointer<void>(weight),
                                      static_cast<DType>(dtype)};
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
