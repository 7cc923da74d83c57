#include "tensors.h"

namespace py = pybind11;

namespace lora_ops {
namespace {

// DLPack's DLPackExchangeAPI, whose layout this has. Only one function is called.
struct ExchangeApi {
  uint32_t major, minor;
  void* previous;
  void *allocator, *from_object, *to_object;
  int (*view)(void* object, TensorView* out);
  void* stream;
};

struct Torch {
  const ExchangeApi* api = nullptr;
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyObject* empty = nullptr;
  PyObject* dtypes[3] = {};
  PyObject* dtype_keyword = nullptr;  // ("dtype",)
};
Torch torch;  // its objects are kept for good: torch outlives the interpreter's modules

constexpr int kCpu = 1;

py::object empty(PyObject* shape, DType dtype) {
  PyObject* args[] = {shape, torch.dtypes[static_cast<int>(dtype)]};
  PyObject* made = PyObject_Vectorcall(torch.empty, args, 1, torch.dtype_keyword);
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

}  // namespace

void use_tensors(const py::capsule& api, const py::object& tensor, const py::object& parameter, const py::object& empty,
                 const py::tuple& dtypes) {
  const auto* table = static_cast<const ExchangeApi*>(api.get_pointer());
  if (table->major != 1 || !table->view) return;
  torch.tensor = reinterpret_cast<PyTypeObject*>(py::object(tensor).release().ptr());
  torch.parameter = reinterpret_cast<PyTypeObject*>(py::object(parameter).release().ptr());
  torch.empty = py::object(empty).release().ptr();
  for (int i = 0; i < 3; ++i) torch.dtypes[i] = py::object(dtypes[i]).release().ptr();
  torch.dtype_keyword = py::make_tuple("dtype").release().ptr();
  torch.api = table;
}

Tensors::Tensors() : fit_(torch.api != nullptr) {}

bool Tensors::view(const py::object& t, TensorView& out) {
  if (!fit_) return false;
  const PyTypeObject* type = Py_TYPE(t.ptr());
  require(type == torch.tensor || type == torch.parameter);
  if (fit_ && torch.api->view(t.ptr(), &out) != 0) {  // sparse, or otherwise not a plain piece of memory
    PyErr_Clear();
    fit_ = false;
  }
  require(fit_ && out.device_type == kCpu && out.lanes == 1 && out.dims >= 0);
  return fit_;
}

bool Tensors::floating(const py::object& t, TensorView& out, DType& dtype) {
  if (!view(t, out)) return false;
  require((out.code == kFloat && (out.bits == 32 || out.bits == 16)) || (out.code == kBfloat && out.bits == 16));
  dtype = out.bits == 32 ? DType::f32 : out.code == kBfloat ? DType::bf16 : DType::f16;
  return fit_;
}

namespace {
void* data(const TensorView& v) {
  return static_cast<char*>(v.data) + v.byte_offset;
}
}  // namespace

Matrix Tensors::rows(const py::object& t, int64_t& M, int64_t& cols) {
  TensorView v;
  DType dtype;
  if (!floating(t, v, dtype)) return {};
  require(v.dims >= 1 && v.strides[v.dims - 1] == 1);
  if (!fit_) return {};
  cols = v.shape[v.dims - 1];
  M = 1;
  int64_t stride = cols;
  bool inner = true;  // no dimension of more than one row yet
  for (int d = v.dims - 2; d >= 0; --d) {
    if (v.shape[d] == 1) continue;
    if (inner) {
      stride = v.strides[d];
      inner = false;
    } else {
      require(v.strides[d] == stride * M);
    }
    M *= v.shape[d];
  }
  require(M > 0 && cols > 0 && stride > 0);
  return {data(v), stride, 1, dtype};
}

Matrix Tensors::matrix(const py::object& t, int64_t& rows, int64_t& cols) {
  TensorView v;
  DType dtype;
  if (!floating(t, v, dtype)) return {};
  require(v.dims == 2);
  if (!fit_) return {};
  rows = v.shape[0], cols = v.shape[1];
  require(rows > 0 && cols > 0 && (v.strides[1] == 1 || v.strides[0] == 1));
  return {data(v), v.strides[0], v.strides[1], dtype};
}

Matrix Tensors::vector(const py::object& t, int64_t& count) {
  TensorView v;
  DType dtype;
  if (!floating(t, v, dtype)) return {};
  require(v.dims == 1 && v.strides[0] == 1);
  if (!fit_) return {};
  count = v.shape[0];
  return {data(v), 0, 1, dtype};
}

const void* Tensors::elements(const py::object& t, int code, int bits, int64_t& rows, int64_t& count) {
  TensorView v;
  if (!view(t, v)) return nullptr;
  require(v.code == code && v.bits == bits);
  rows = v.dims ? v.shape[0] : 1;
  count = 1;
  for (int d = v.dims - 1; d >= 0 && fit_; --d) {
    require(v.strides[d] == count || v.shape[d] == 1);
    count *= v.shape[d];
  }
  return fit_ ? data(v) : nullptr;
}

py::object Tensors::new_like(const py::object& like, int64_t cols, DType dtype) const {
  TensorView v;
  torch.api->view(like.ptr(), &v);
  py::tuple shape(v.dims);
  for (int d = 0; d < v.dims; ++d) shape[d] = d + 1 < v.dims ? v.shape[d] : cols;
  return empty(shape.ptr(), dtype);
}

py::object Tensors::new_matrix(int64_t rows, int64_t cols, DType dtype) const {
  return empty(py::make_tuple(rows, cols).ptr(), dtype);
}

py::object Tensors::new_vector(int64_t count, DType dtype) const {
  return empty(py::make_tuple(count).ptr(), dtype);
}

void* Tensors::address(const py::object& t) const {
  TensorView v;
  torch.api->view(t.ptr(), &v);
  return data(v);
}

}  // namespace lora_ops
