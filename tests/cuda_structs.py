"""csrc/cuda's structs for ctypes, and tensors laid out in every way that a kernel tells apart."""

import ctypes

import torch
from torch import Tensor

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


def matrix(t: Tensor | None) -> Matrix:
    if t is None:
        return Matrix(None, 0, 1, 0)
    t = t.view(1, -1) if t.dim() == 1 else t
    return Matrix(t.data_ptr(), *t.stride(), _DTYPE[t.dtype])


# contiguous; rows that begin at multiples of 16 bytes, whatever their length; rows that do not
LAYOUTS = ["plain", "padded", "odd"]


def empty(rows: int, cols: int, dtype: torch.dtype, layout: str) -> Tensor:
    stride = {"plain": cols, "padded": (cols + 15) // 8 * 8, "odd": cols + 1 + cols % 2}[layout]
    return torch.empty(rows * stride + 1, dtype=dtype).as_strided((rows, cols), (stride, 1), int(layout == "odd"))


def laid_out(t: Tensor, layout: str, transposed: bool = False) -> Tensor:
    """t with rows, or with `transposed` columns, laid out so. What lies between rows is uninitialised memory."""
    if transposed:
        return laid_out(t.T, layout).T
    return empty(*t.shape, t.dtype, layout).copy_(t)
