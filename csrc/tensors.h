// Torch's tensors without torch's headers: a table of C functions that torch.Tensor.__dlpack_c_exchange_api__ holds
// (DLPack 1.3, torch 2.10 and later) says where a tensor lies, for some 20 ns. In Python the same questions cost a microsecond
// each, and several times that where a layer's product has just swept the interpreter from the caches.
//
// A call takes this way only where everything fits: plain tensors of torch's on the CPU, shapes, dtypes and strides as the
// kernels want them. Otherwise it returns None, and lora_ops/ops.py goes the long way: it copies, or says what is wrong.
#pragma once

#include <pybind11/pybind11.h>

#include "params.h"

namespace lora_ops {

// `api`: that table's capsule; an object is taken if its type is one of the two; `empty`: torch.empty; `dtypes`: those of
// DType, in order.
void use_tensors(const pybind11::capsule& api, const pybind11::object& tensor, const pybind11::object& parameter,
                 const pybind11::object& empty, const pybind11::tuple& dtypes);

// DLPack's DLTensor, whose layout this has.
struct TensorView {
  void* data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;
};

// What fits so far; the first thing that does not ends it.
class Tensors {
 public:
  Tensors();
  bool fit() const { return fit_; }
  void require(bool condition) { fit_ = fit_ && condition; }

  // A floating tensor (..., cols) as a matrix with contiguous rows.
  Matrix rows(const pybind11::object& t, int64_t& M, int64_t& cols);
  // A floating matrix, one of whose strides is 1.
  Matrix matrix(const pybind11::object& t, int64_t& rows, int64_t& cols);
  // A contiguous floating vector.
  Matrix vector(const pybind11::object& t, int64_t& count);
  // A contiguous tensor of `bits` wide elements of DLPack's type `code`: its first dimension and how many they are in all.
  const void* elements(const pybind11::object& t, int code, int bits, int64_t& rows, int64_t& count);

  // t's dtype is x's, or float32 beside a half-precision x.
  void beside(DType x, DType t) { require(t == x || t == DType::f32); }

  // torch.empty: (*like's shape but for the last, cols), or a shape of one or two numbers.
  pybind11::object new_like(const pybind11::object& like, int64_t cols, DType dtype) const;
  pybind11::object new_matrix(int64_t rows, int64_t cols, DType dtype) const;
  pybind11::object new_vector(int64_t count, DType dtype) const;
  void* address(const pybind11::object& t) const;

 private:
  bool view(const pybind11::object& t, TensorView& out);
  bool floating(const pybind11::object& t, TensorView& out, DType& dtype);
  bool fit_;
};

constexpr int kInt = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4;  // DLPack's type codes

}  // namespace lora_ops
