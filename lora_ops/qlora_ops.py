"""torch.ops.lora_ops.qlora_*: what ops.py has, for a weight in 4 bits.

    qlora_forward   y, S from x, the frozen weight's codes and scales, and one adapter
    qlora_backward  dx, dA, dB, dbias, of which only those asked for are computed (the others come back empty)
    qlora_row_norms  the weight's rows, squared and summed

The weight is decoded inside the kernels, so that it never exists as a whole.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _C, checks, log, ops, reference
from .autograd import Operator, library, register, register_autograd
from .quant import NF4Weight, layout

_PIECE = 1 << 20  # bytes of weights that are decoded at a time where torch multiplies them

_WEIGHT = (
    "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, int blocksize, str quant_type"
)
library.define(
    f"qlora_forward(Tensor x, {_WEIGHT}, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? seed, "
    "float scaling, float dropout_p) -> (Tensor, Tensor)"
)
library.define(
    f"qlora_backward(Tensor dy, Tensor? x, {_WEIGHT}, Tensor lora_A, Tensor lora_B, Tensor? S, Tensor? seed, "
    "float scaling, float dropout_p, bool need_dx, bool need_dA, bool need_dB, bool need_dbias) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(f"qlora_forward_wide(Tensor x, {_WEIGHT}, Tensor lora_A, Tensor lora_B, float scaling) -> (Tensor, Tensor)")
library.define(f"qlora_row_norms({_WEIGHT}, int K) -> Tensor")


class Weight(NamedTuple):
    """The arguments that say what the weight is: NF4Weight's attributes of the same names."""

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None
    blocksize: int
    quant_type: str

    def scales(self, first: int = 0, end: int | None = None) -> Tensor:
        """absmax[first:end] in float32."""
        if self.nested_absmax is None or self.nested_code is None or self.offset is None:
            return self.absmax[first:end]
        group = first // reference.NESTED_BLOCKSIZE
        start = group * reference.NESTED_BLOCKSIZE
        nested = self.nested_absmax[group:], self.nested_code, self.offset
        return reference.dequantize_absmax(self.absmax[start:end], *nested)[first - start :]

    def dequantize(self, K: int, dtype: torch.dtype) -> Tensor:
        shape = (self.codes.shape[0], K)
        return layout.dequantize(self.codes, self.scales(), shape, self.blocksize, self.quant_type, dtype)

    def pieces(self, K: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Some rows at a time, and their weights in dtype: 1 MiB, or more where fewer rows are no whole number of blocks."""
        rows = self.blocksize // math.gcd(K, self.blocksize)
        rows *= max(1, _PIECE // (rows * K * dtype.itemsize))
        for n in range(0, self.codes.shape[0], rows):
            codes = self.codes[n : n + rows]
            shape = (codes.shape[0], K)
            first = n * K // self.blocksize
            scales = self.scales(first, first + -(-codes.shape[0] * K // self.blocksize))
            yield slice(n, n + rows), layout.dequantize(codes, scales, shape, self.blocksize, self.quant_type, dtype)

    def for_kernel(self) -> ops.FourBit:
        nested = (0 if t is None else t.data_ptr() for t in (self.nested_absmax, self.nested_code, self.offset))
        quant_type = layout.QUANT_TYPES[self.quant_type]
        return self.codes.data_ptr(), quant_type, self.blocksize, self.absmax.data_ptr(), *nested  # type: ignore[return-value]


def weight_of(qweight: NF4Weight) -> Weight:
    q = qweight
    return Weight(q.codes, q.absmax, q.nested_absmax, q.nested_code, q.offset, q.blocksize, q.quant_type)


def operand_of(weight: Tensor | NF4Weight) -> tuple[list[Tensor], int, str]:
    """The tensors, blocksize and quant_type of operators that take either kind of weight: [W0], 0, "" or a 4-bit weight's."""
    if isinstance(weight, NF4Weight):
        *tensors, blocksize, quant_type = weight_of(weight)  # no slice: torch.compile of torch 2.8 cannot make one
        return [t for t in tensors if t is not None], blocksize, quant_type
    return [weight], 0, ""


def check(
    x: Tensor, weight: Weight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float, dropout_p: float
) -> None:
    """Raises ValueError or TypeError naming the argument that does not fit, what it is and what it may be."""
    layout.check_code(weight.blocksize, weight.quant_type)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be (..., K) with K >= 1, got shape {tuple(x.shape)}")
    if weight.codes.dim() != 2 or weight.codes.shape[0] < 1:
        raise ValueError(f"codes must be (N, row_bytes(K)) with N >= 1, got shape {tuple(weight.codes.shape)}")
    codes, absmax, nested_absmax, nested_code, offset, _, _ = weight
    layout.check_tensors(codes, absmax, nested_absmax, nested_code, offset, (codes.shape[0], x.shape[-1]), weight.blocksize)
    check_beside(x, weight.codes, lora_A, lora_B, bias, scaling, dropout_p)


def check_beside(x: Tensor, codes: Tensor, *beside) -> None:  # type: ignore[no-untyped-def]
    checks.check_beside(x, (codes.shape[0], x.shape[-1]), None, *beside)
    if codes.device != x.device:
        raise ValueError(f"codes must be on x's device {x.device}, got {codes.device}")


def _forward_cpu(x: Tensor, *args):  # type: ignore[no-untyped-def]
    if x.dtype not in layout.DTYPES:
        return forward_reference(x, *args)
    weight, (lora_A, lora_B, bias, seed, scaling, dropout_p) = Weight(*args[:7]), args[7:]
    check(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    return _forward_checked(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p)


def _forward_of_checked(x: Tensor, *args):  # type: ignore[no-untyped-def]
    """Without checking what an NF4Weight has checked."""
    if x.dtype not in layout.DTYPES:
        return forward_reference(x, *args)
    weight, beside = Weight(*args[:7]), args[7:]
    lora_A, lora_B, bias, seed, scaling, p = beside
    if 0.0 <= p < 1.0 and not ops.base_on_torch(x.dtype):
        drop, threads = ops._dropout(seed, p), torch.get_num_threads()
        done = _C.forward_of_tensors(x, weight, lora_A, lora_B, bias, None, drop, scaling, p, threads)
        if done is not None:
            return done
    check_beside(x, weight.codes, lora_A, lora_B, bias, scaling, p)
    return _forward_checked(x, weight, *beside)


def _forward_checked(x: Tensor, weight: Weight, lora_A, lora_B, bias, seed, scaling, dropout_p, y_dtype=None):  # type: ignore[no-untyped-def]
    rows, N = ops.rows_of(x), lora_B.shape[0]
    y, for_kernel = torch.empty((rows.shape[0], N), dtype=y_dtype or x.dtype), None
    if ops.on_torch(x.dtype):
        for n, piece in weight.pieces(x.shape[-1], x.dtype):
            y[:, n] = rows @ piece.T
    else:
        for_kernel = weight.for_kernel()
    S = ops.forward_kernel(rows, for_kernel, None, lora_A, lora_B, bias, seed, scaling, dropout_p, y)
    return y.view(*x.shape[:-1], N), S


def _backward_cpu(dy: Tensor, x: Tensor | None, *args):  # type: ignore[no-untyped-def]
    if dy.dtype not in layout.DTYPES:
        return backward_reference(dy, x, *args)
    weight, (lora_A, lora_B, S, seed, scaling, dropout_p, need_dx, *need) = Weight(*args[:7]), args[7:]
    if not ops.base_on_torch(dy.dtype):
        drop, threads = ops._dropout(seed, dropout_p), torch.get_num_threads()
        done = _C.backward_of_tensors(dy, x, weight, lora_A, lora_B, S, drop, scaling, (need_dx, *need), threads)
        if done is not None:
            return done
    g, K = ops.rows_of(dy), lora_A.shape[1]
    dx, for_kernel = torch.empty((g.shape[0], K) if need_dx else 0, dtype=dy.dtype), None
    if need_dx and ops.base_on_torch(dy.dtype):
        total = torch.zeros(dx.shape, dtype=torch.float32)
        for n, piece in weight.pieces(K, dy.dtype):
            total += g[:, n] @ piece
        dx.copy_(total)
    elif need_dx:
        for_kernel = weight.for_kernel()
    rest = ops.backward_kernel(g, x, for_kernel, lora_A, lora_B, S, seed, scaling, dropout_p, dx if need_dx else None, *need)
    return dx.view(*dy.shape[:-1], K) if need_dx else dx, *rest


def forward_reference(x: Tensor, *args):  # type: ignore[no-untyped-def]
    weight, (lora_A, lora_B, bias, seed, scaling, dropout_p) = Weight(*args[:7]), args[7:]
    check(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    W = weight.dequantize(x.shape[-1], torch.promote_types(x.dtype, torch.float32))
    return ops.forward_reference(x, W, lora_A, lora_B, bias, None, seed, scaling, dropout_p)


def backward_reference(dy: Tensor, x: Tensor | None, *args):  # type: ignore[no-untyped-def]
    weight, beside = Weight(*args[:7]), args[7:]
    W = weight.dequantize(beside[0].shape[1], torch.promote_types(dy.dtype, torch.float32))
    return ops.backward_reference(dy, x, W, *beside)


def _forward_fake(x: Tensor, *args):  # type: ignore[no-untyped-def]
    weight, (lora_A, lora_B, bias, _, scaling, dropout_p) = Weight(*args[:7]), args[7:]
    check(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    return ops.fake_outputs(x, lora_A, lora_B)


def _backward_fake(dy: Tensor, x: Tensor | None, *args):  # type: ignore[no-untyped-def]
    lora_A, lora_B, _, _, _, _, *need = args[7:]
    return ops.fake_gradients(dy, lora_A, lora_B, *need)


_FORWARD = register("qlora_forward", _forward_cpu, forward_reference, _forward_fake)
_BACKWARD = register("qlora_backward", _backward_cpu, backward_reference, _backward_fake)
OPERATOR = Operator(
    _FORWARD, _BACKWARD, 7,
    {False: (log.watched("qlora_forward", _forward_of_checked, log.DIRECT), _backward_cpu)},
    (log.watched("qlora_forward", forward_reference, log.DIRECT), backward_reference),
)  # fmt: skip
register_autograd("qlora_forward", OPERATOR)


def _wide_cpu(x: Tensor, *args):  # type: ignore[no-untyped-def]
    if x.dtype not in layout.DTYPES:
        return _wide(x, *args)
    weight, (lora_A, lora_B, scaling) = Weight(*args[:7]), args[7:]
    check(x, weight, lora_A, lora_B, None, scaling, 0.0)
    return _forward_checked(x, weight, lora_A, lora_B, None, None, scaling, 0.0, torch.float32)


def _wide(x: Tensor, *args):  # type: ignore[no-untyped-def]
    y, S = _FORWARD(x, *args[:-1], None, None, args[-1], 0.0)
    return y.to(S.dtype), S


register("qlora_forward_wide", _wide_cpu, _wide, _wide)


def _row_norms(*args):  # type: ignore[no-untyped-def]
    return torch.cat([rows.square().sum(1) for _, rows in Weight(*args[:7]).pieces(args[7], torch.float32)])


def _row_norms_fake(codes: Tensor, *_args):  # type: ignore[no-untyped-def]
    return codes.new_empty(codes.shape[0], dtype=torch.float32)


register("qlora_row_norms", _row_norms, _row_norms, _row_norms_fake)


def qlora_forward(
    x: Tensor,
    qweight: NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """torch.ops.lora_ops.qlora_forward of an NF4Weight."""
    return OPERATOR(x, *weight_of(qweight), lora_A, lora_B, bias, seed, scaling, dropout_p)
