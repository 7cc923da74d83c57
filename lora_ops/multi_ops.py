"""torch.ops.lora_ops.multi_lora_*: what ops.py has, for rows that each have an adapter of their own.

    multi_lora_forward   y, S from x, the frozen weight (dense, or in 4 bits), any number of adapters and each row's index
    multi_lora_backward  dx, dA and dB of every adapter, dbias in fp32, of which only those asked for are computed

`weight` is [W0] or an NF4Weight's tensors (then blocksize and quant_type say how to read them). Shapes of outputs depend on no
index: S is (M, largest r), and an adapter that no row has gets zeros.
"""

import math

import torch
from torch import Tensor

from . import _C, checks, log, ops, qlora_ops, reference
from .autograd import (
    _below_autograd,
    backward_for,
    check_frozen,
    check_untransformed,
    differentiable_once,
    library,
    plain_call,
    register,
    transformed,
)

_ARGUMENTS = (
    "Tensor[] weight, int K, int blocksize, str quant_type, Tensor[] lora_A, Tensor[] lora_B, Tensor scalings, "
    "Tensor adapter_ids"
)
library.define(f"multi_lora_forward(Tensor x, {_ARGUMENTS}, Tensor? bias, Tensor? seed, float dropout_p) -> (Tensor, Tensor)")
library.define(
    f"multi_lora_backward(Tensor dy, Tensor? x, {_ARGUMENTS}, Tensor? S, Tensor? seed, float dropout_p, bool need_dx, "
    "bool[] need_dA, bool[] need_dB, bool need_dbias) -> (Tensor, Tensor[], Tensor[], Tensor)"
)


def check(x, weight, K, blocksize, quant_type, lora_A, lora_B, scalings, adapter_ids, bias, dropout_p) -> None:  # type: ignore[no-untyped-def]
    """Raises ValueError or TypeError naming the argument that does not fit, what it is and what it may be."""
    N, dense = weight[0].shape[0], None if quant_type else weight[0]
    if len(lora_A) != len(lora_B) or scalings.shape != (len(lora_A),):
        raise ValueError(
            f"lora_A, lora_B and scalings must be of one length, got {len(lora_A)}, {len(lora_B)}, {scalings.shape}"
        )
    M = math.prod(x.shape[:-1])
    if adapter_ids.dtype != torch.int64 or adapter_ids.shape != (M,):
        shape = tuple(adapter_ids.shape)
        raise ValueError(f"adapter_ids must be (rows,) = ({M},) of int64, got shape {shape}, {adapter_ids.dtype}")
    if not lora_A:
        beside = x.new_empty(1, K), x.new_empty(N, 1)
        checks.check_beside(x, (N, K), dense, *beside, bias, 1.0, dropout_p)
    dtype, device = lora_A[0].dtype if lora_A else None, x.device
    for i, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        r = A.shape[0]
        if i == 0 or r < 1 or A.shape != (r, K) or B.shape != (N, r) or A.device != device or B.device != device:
            checks.check_beside(x, (N, K), dense, A, B, bias, 1.0, dropout_p)
        if A.dtype is not dtype or B.dtype is not dtype:
            raise TypeError(
                f"lora_A and lora_B of all adapters in a batch must have one dtype, got {dtype}, {A.dtype}, {B.dtype}"
            )


def _for_kernel(weight: list[Tensor], blocksize: int, quant_type: str) -> ops.Matrix | ops.FourBit:
    return _codes(weight, blocksize, quant_type).for_kernel() if quant_type else ops.matrix(weight[0])


def _codes(weight: list[Tensor], blocksize: int, quant_type: str) -> qlora_ops.Weight:
    nested_absmax, nested_code, offset = weight[2:] if len(weight) > 2 else (None, None, None)
    return qlora_ops.Weight(weight[0], weight[1], nested_absmax, nested_code, offset, blocksize, quant_type)


def _dense(x: Tensor, weight: list[Tensor], K: int, blocksize: int, quant_type: str) -> Tensor:
    if not quant_type:
        return weight[0]
    return _codes(weight, blocksize, quant_type).dequantize(K, torch.promote_types(x.dtype, torch.float32))


def _dtype(adapters: list[Tensor]) -> int:
    return ops._DTYPES[adapters[0].dtype] if adapters else 0


def _forward_cpu(x, weight, K, blocksize, quant_type, lora_A, lora_B, scalings, adapter_ids, bias, seed, dropout_p):  # type: ignore[no-untyped-def]
    if x.shape[-1:] == (K,) and not ops.base_on_torch(x.dtype):
        whole, drop = _codes(weight, blocksize, quant_type) if quant_type else tuple(weight), ops._dropout(seed, dropout_p)
        threads = torch.get_num_threads()
        done = _C.multi_forward_of_tensors(x, whole, lora_A, lora_B, scalings, adapter_ids, bias, drop, dropout_p, threads)
        if done is not None:
            return done
    N, rows = weight[0].shape[0], ops.rows_of(x)
    if x.dtype not in ops._DTYPES or N * K == 0:
        return forward_reference(
            x, weight, K, blocksize, quant_type, lora_A, lora_B, scalings, adapter_ids, bias, seed, dropout_p
        )
    check(x, weight, K, blocksize, quant_type, lora_A, lora_B, scalings, adapter_ids, bias, dropout_p)
    As, Bs = [A.contiguous() for A in lora_A], [B.contiguous() for B in lora_B]
    adapters = [(A.data_ptr(), B.data_ptr(), 0, 0, A.shape[0]) for A, B in zip(As, Bs, strict=True)]
    M, r, external = rows.shape[0], max((A.shape[0] for A in As), default=0), ops.on_torch(x.dtype)
    if log.ON:
        log.note(f"{log.kernels()}, by addresses")
    if external:
        y = rows @ _dense(x, weight, K, blocksize, quant_type).to(x.dtype).T
    else:
        weight = weight if quant_type else [ops._strided(weight[0])]
        y = torch.empty((M, N), dtype=x.dtype)
    S, ids = torch.empty((M, r), dtype=torch.float32), adapter_ids.contiguous()
    bias = None if bias is None else bias.contiguous()
    _C.multi_lora_forward(
        M, K, N, r, ops.matrix(rows), None if external else _for_kernel(weight, blocksize, quant_type), adapters,
        scalings.tolist(), _dtype(As), ids.data_ptr(), ops.matrix(bias),
        *ops._dropout(seed, dropout_p), ops.matrix(y), S.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y.view(*x.shape[:-1], N), S


def _backward_cpu(  # type: ignore[no-untyped-def]
    dy, x, weight, K, blocksize, quant_type, lora_A, lora_B, scalings, adapter_ids, S, seed, dropout_p, need_dx, need_dA,
    need_dB, need_dbias,
):  # fmt: skip
    N, g = weight[0].shape[0], ops.rows_of(dy)
    if dy.dtype not in ops._DTYPES or N * K == 0:
        return backward_reference(
            dy, x, weight, K, blocksize, quant_type, lora_A, lora_B, scalings, adapter_ids, S, seed, dropout_p, need_dx,
            need_dA, need_dB, need_dbias,
        )  # fmt: skip
    M, r = g.shape[0], max((A.shape[0] for A in lora_A), default=0)
    external = need_dx and ops.base_on_torch(dy.dtype)
    if external:
        dx = g @ _dense(dy, weight, K, blocksize, quant_type).to(dy.dtype)
    else:
        weight = weight if quant_type else [ops._strided(weight[0])]
        dx = torch.empty((M, K) if need_dx else 0, dtype=dy.dtype)
    ids = adapter_ids.contiguous()
    occur = set(ids.tolist())

    def gradient(i: int, like: Tensor, need: bool) -> Tensor:
        return torch.empty(0, dtype=like.dtype) if not need else torch.empty(like.shape, dtype=like.dtype) if i in occur else (
            torch.zeros(like.shape, dtype=like.dtype)
        )  # fmt: skip

    dA = [gradient(i, A, need) for i, (A, need) in enumerate(zip(lora_A, need_dA, strict=True))]
    dB = [gradient(i, B, need) for i, (B, need) in enumerate(zip(lora_B, need_dB, strict=True))]
    dbias = torch.empty(N if need_dbias else 0, dtype=torch.float32)
    As, Bs = [A.contiguous() for A in lora_A], [B.contiguous() for B in lora_B]
    adapters = [
        (A.data_ptr(), B.data_ptr(), dA[i].data_ptr() if need_dA[i] else 0, dB[i].data_ptr() if need_dB[i] else 0, A.shape[0])
        for i, (A, B) in enumerate(zip(As, Bs, strict=True))
    ]  # fmt: skip
    rows = ops.rows_of(x) if any(need_dA) and x is not None else None
    operand = _for_kernel(weight, blocksize, quant_type) if need_dx and not external else None
    _C.multi_lora_backward(
        M, K, N, r, ops.matrix(g), ops.matrix(rows), operand, adapters, scalings.tolist(), _dtype(As), ids.data_ptr(),
        0 if S is None else S.data_ptr(), *ops._dropout(seed, dropout_p), ops.matrix(dx if need_dx else None),
        ops.matrix(dbias if need_dbias else None), torch.get_num_threads(),
    )  # fmt: skip
    return dx.view(*dy.shape[:-1], K) if need_dx else dx, dA, dB, dbias


def forward_reference(x, weight, K, blocksize, quant_type, lora_A, lora_B, scalings, adapter_ids, bias, seed, dropout_p):  # type: ignore[no-untyped-def]
    if log.ON:
        log.note(log.reference(x, transformed()))
    check(x, weight, K, blocksize, quant_type, lora_A, lora_B, scalings, adapter_ids, bias, dropout_p)
    W = _dense(x, weight, K, blocksize, quant_type)
    rows = x.reshape(math.prod(x.shape[:-1]), K)
    y, S = reference.multi_lora_forward(rows, W, lora_A, lora_B, scalings.tolist(), adapter_ids, bias, dropout_p, seed)
    return y.reshape(*x.shape[:-1], W.shape[0]), S


def backward_reference(  # type: ignore[no-untyped-def]
    dy, x, weight, K, blocksize, quant_type, lora_A, lora_B, scalings, adapter_ids, S, seed, dropout_p, need_dx, need_dA,
    need_dB, need_dbias,
):  # fmt: skip
    W, M = _dense(dy, weight, K, blocksize, quant_type), math.prod(dy.shape[:-1])
    rows = None if x is None else x.reshape(M, K)
    dx, dA, dB, dbias = reference.multi_lora_backward(
        dy.reshape(M, W.shape[0]), rows, W, lora_A, lora_B, scalings.tolist(), adapter_ids, S, dropout_p, seed,
        need=(need_dx, need_dA, need_dB, need_dbias),
    )  # fmt: skip
    empty = dy.new_empty(0)
    return (
        empty if dx is None else dx.reshape(*dy.shape[:-1], K),
        [A.new_empty(0) if d is None else d for A, d in zip(lora_A, dA, strict=True)],
        [B.new_empty(0) if d is None else d for B, d in zip(lora_B, dB, strict=True)],
        dy.new_empty(0, dtype=torch.promote_types(dy.dtype, torch.float32)) if dbias is None else dbias,
    )


def _forward_fake(x, weight, K, blocksize, quant_type, lora_A, lora_B, scalings, adapter_ids, bias, seed, dropout_p):  # type: ignore[no-untyped-def]
    check(x, weight, K, blocksize, quant_type, lora_A, lora_B, scalings, adapter_ids, bias, dropout_p)
    r = max((A.shape[0] for A in lora_A), default=0)
    S = x.new_empty((math.prod(x.shape[:-1]), r), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x.new_empty((*x.shape[:-1], weight[0].shape[0])), S


def _backward_fake(  # type: ignore[no-untyped-def]
    dy, x, weight, K, blocksize, quant_type, lora_A, lora_B, scalings, adapter_ids, S, seed, dropout_p, need_dx, need_dA,
    need_dB, need_dbias,
):  # fmt: skip
    return (
        dy.new_empty((*dy.shape[:-1], K) if need_dx else 0),
        [A.new_empty(A.shape if need else 0) for A, need in zip(lora_A, need_dA, strict=True)],
        [B.new_empty(B.shape if need else 0) for B, need in zip(lora_B, need_dB, strict=True)],
        dy.new_empty(weight[0].shape[0] if need_dbias else 0, dtype=torch.promote_types(dy.dtype, torch.float32)),
    )


class _MultiLora(torch.autograd.Function):
    """autograd.py's _Lora for lists of adapters."""

    @staticmethod
    def forward(ctx, keyset, weight, constants, scalings, adapter_ids, seed, dropout_p, x, bias, *adapters):  # type: ignore[no-untyped-def]
        n = len(adapters) // 2
        As, Bs = list(adapters[:n]), list(adapters[n:])
        need_dx, need_dbias, *need = ctx.needs_input_grad[7:]
        need_dA, need_dB = need[:n], need[n:]
        y, S = _below_autograd(_FORWARD, keyset, x, weight, *constants, As, Bs, scalings, adapter_ids, bias, seed, dropout_p)
        saved_x, saved_S = x if any(need_dA) else None, S if any(need_dB) else None
        ctx.save_for_backward(saved_x, saved_S, seed, scalings, adapter_ids, *weight, *adapters)
        ctx.mark_non_differentiable(S)
        ctx.set_materialize_grads(False)
        ctx.constants, ctx.dropout_p, ctx.weights, ctx.n = constants, dropout_p, len(weight), n
        ctx.need = need_dx, list(need_dA), list(need_dB), need_dbias
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, S

    @staticmethod
    def backward(ctx, dy, _dS):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise differentiable_once("multi_lora_linear")
        nothing = [None] * len(ctx.needs_input_grad)
        if dy is None:
            return tuple(nothing)
        x, S, seed, scalings, adapter_ids, *rest = ctx.saved_tensors
        weight, adapters = rest[: ctx.weights], rest[ctx.weights :]
        As, Bs = adapters[: ctx.n], adapters[ctx.n :]
        backward = backward_for((dy,), _BACKWARD, _BACKWARD, backward_reference)
        dx, dA, dB, dbias = backward(
            dy, x, weight, *ctx.constants, As, Bs, scalings, adapter_ids, S, seed, ctx.dropout_p, *ctx.need
        )
        gradients = (dx, dbias.to(ctx.bias_dtype), *dA, *dB)
        needs = ctx.needs_input_grad[7:]
        return (*nothing[:7], *(d if need else None for d, need in zip(gradients, needs, strict=True)))


def _autograd(keyset, x, weight, K, blocksize, quant_type, As, Bs, scalings, adapter_ids, bias, seed, dropout_p):  # type: ignore[no-untyped-def]
    check_untransformed("multi_lora_forward")
    constants = K, blocksize, quant_type
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, bias, *weight, *As, *Bs):
        for t in weight:
            check_frozen(t)
        return _MultiLora.apply(keyset, weight, constants, scalings, adapter_ids, seed, dropout_p, x, bias, *As, *Bs)
    return _below_autograd(_FORWARD, keyset, x, weight, *constants, As, Bs, scalings, adapter_ids, bias, seed, dropout_p)


_forward_direct = log.watched("multi_lora_forward", _forward_cpu, log.DIRECT)
_reference_direct = log.watched("multi_lora_forward", forward_reference, log.DIRECT)
_FORWARD = register("multi_lora_forward", _forward_cpu, forward_reference, _forward_fake)
_BACKWARD = register("multi_lora_backward", _backward_cpu, backward_reference, _backward_fake)
library.impl("multi_lora_forward", _autograd, "Autograd", with_keyset=True)


def multi_lora_forward(x, weight, K, blocksize, quant_type, As, Bs, scalings, adapter_ids, bias, seed, dropout_p):  # type: ignore[no-untyped-def]
    """torch.ops.lora_ops.multi_lora_forward; without the dispatcher where it has no say."""
    plain = plain_call((x, *weight, *As, *Bs, bias, seed))
    call = _forward_direct if plain else _reference_direct if transformed() else _FORWARD
    return call(x, weight, K, blocksize, quant_type, As, Bs, scalings, adapter_ids, bias, seed, dropout_p)
