"""csrc/cuda's structs for ctypes, and tensors laid out in every way that a kernel tells apart."""

import ctypes

import torch
from ptx.device import Run
from torch import Tensor

from lora_ops import NF4Weight
from lora_ops.qlora_ops import weight_of
from lora_ops.quant.layout import QUANT_TYPES

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TILES = {"automatic": 0, "small": 1, "medium": 2, "large": 3}


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("col_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int),
    ]


class Dropout(ctypes.Structure):
    _fields_ = [("seed", ctypes.c_void_p), ("threshold", ctypes.c_uint32), ("keep_scale", ctypes.c_float)]


class LoraForward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in "MKNr"),
        *((name, Matrix) for name in ("x", "weight", "lora_B", "bias", "y")),
        ("S", ctypes.c_void_p),
        ("scaling", ctypes.c_float),
        ("tile", ctypes.c_int),
        ("S_row_stride", ctypes.c_int64),
        ("gate", ctypes.c_void_p),
        ("gate_row_stride", ctypes.c_int64),
        ("m", Matrix),
    ]


class LoraBackwardDx(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in "MKNr"),
        *((name, Matrix) for name in ("dy", "weight", "lora_A", "dx")),
        ("dS", ctypes.c_void_p),
        ("dropout", Dropout),
        ("tile", ctypes.c_int),
        ("dS_row_stride", ctypes.c_int64),
        ("gate", ctypes.c_void_p),
        ("gate_row_stride", ctypes.c_int64),
    ]


class QuantizedWeight(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "absmax", "nested_absmax", "nested_code", "offset")),
        ("blocksize", ctypes.c_int64),
        ("quant_type", ctypes.c_int),
    ]


def quantized(run: Run, qweight: NF4Weight) -> QuantizedWeight:
    """The weight as the run's device has it, never written to."""
    tensors = weight_of(qweight)[:5]
    for t in tensors:
        if t is not None:
            run.register(t, readonly=True)
    addresses = (None if t is None else t.data_ptr() for t in tensors)
    return QuantizedWeight(*addresses, qweight.blocksize, QUANT_TYPES[qweight.quant_type])


def matrix(t: Tensor | None) -> Matrix:
    if t is None:
        return Matrix(None, 0, 1, 0)
    t = t.view(1, -1) if t.dim() == 1 else t
    return Matrix(t.data_ptr(), *t.stride(), _DTYPE[t.dtype])


# contiguous; rows that begin at multiples of 16 bytes, whatever their length; rows that do not
LAYOUTS = ["plain", "padded", "odd"]


def empty(rows: int, cols: int, dtype: torch.dtype, layout: str, apart: int = 0) -> Tensor:
    stride = {"plain": cols, "padded": (cols + 15) // 8 * 8 + apart, "odd": cols + 1 + cols % 2 + apart}[layout]
    first = int(layout == "odd")  # nothing lies behind the last element
    size = first + (rows - 1) * stride + cols if rows > 0 else first
    return torch.empty(size, dtype=dtype).as_strided((rows, cols), (stride, 1), first)


def laid_out(t: Tensor, layout: str, transposed: bool = False, apart: int = 0) -> Tensor:
    """t with rows, or with `transposed` columns, laid out so. What lies between rows is uninitialised memory, `apart` elements
    more of it where there is any: no two operands then have the same strides."""
    if transposed:
        return laid_out(t.T, layout, apart=apart).T
    return empty(*t.shape, t.dtype, layout, apart).copy_(t)


def strides(t: Tensor | None) -> tuple[int | None, int]:
    """Address and row stride of a matrix, of one row for all, or of none."""
    if t is None:
        return None, 0
    return t.data_ptr(), t.stride(0) if t.dim() == 2 else 0


def call(run: Run, op: str, *arguments: ctypes.Structure | ctypes.Array | int) -> None:
    """lora_ops_<op>(pointers to the structs, counts as they are, stream)."""
    run.library.lora_ops_last_error.restype = ctypes.c_char_p
    passed = [a if isinstance(a, int) else ctypes.byref(a) for a in arguments]
    if getattr(run.library, f"lora_ops_{op}")(*passed, None):
        raise RuntimeError(run.library.lora_ops_last_error().decode())
