"""torch.ops.lora_ops.*: schema, kernels per device, shapes for the compiler, autograd. Nothing else has them.

    lora_forward    y, S from x, the frozen weight and one adapter
    lora_forward_wide  y in fp32 and S, where y goes on to be multiplied
    lora_backward   dx, dA, dB, dbias in fp32, of which only those asked for are computed (the others come back empty)

qlora_ops.py has the same two for a 4-bit weight. The extension takes addresses and sizes (csrc/bindings.cpp); torch
allocates every output. Devices and dtypes without a kernel run lora_ops/reference.py.
"""

import functools
import math
import os

import torch
from torch import Tensor

from . import _C, log, reference
from .autograd import Operator, library, register, register_autograd, transformed
from .checks import check, check_kept

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

library.define(
    "lora_forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? panels, Tensor? seed, "
    "float scaling, float dropout_p) -> (Tensor, Tensor)"
)
library.define(
    "lora_backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? S, Tensor? seed, "
    "float scaling, float dropout_p, bool need_dx, bool need_dA, bool need_dB, bool need_dbias) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
library.define("lora_forward_wide(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling) -> (Tensor, Tensor)")


# --- arguments --------------------------------------------------------------------------------------------------------


def _strided(t: Tensor) -> Tensor:
    """A 2-D tensor that the kernels can walk: one stride is 1. Copies only what has no such stride."""
    if t.stride(1) == 1 or t.stride(0) == 1 or t.numel() == 0:
        return t
    return t.contiguous()


def rows_of(t: Tensor) -> Tensor:
    """(..., C) as (rows, C) with contiguous rows, a view wherever one exists."""
    if t.dim() != 2:
        t = t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


Matrix = tuple[int, int, int, int] | None
# A 4-bit weight: address of codes, quant type, blocksize, addresses of absmax, nested_absmax, nested_code and offset.
FourBit = tuple[int, int, int, int, int, int, int]
# Of the general form: gate, its row stride, core, out_scale and z, then of the backward dgate, dcore and dout_scale.
General = tuple[int, int, Matrix, int, Matrix] | tuple[int, int, Matrix, int, Matrix, int, int, int]


def matrix(t: Tensor | None) -> Matrix:
    """A tensor for the extension: address, row stride, column stride, dtype. A vector is one row."""
    if t is None:
        return None
    row, col = t.stride() if t.dim() == 2 else (0, t.stride(0))
    if t.shape[-1] == 1:  # torch gives a dimension of one element any stride
        col = 1
    return t.data_ptr(), row, col, _DTYPES[t.dtype]


def _dropout(seed: Tensor | None, p: float) -> tuple[int, int, float]:
    if seed is None:
        return 0, 0, 1.0
    return int(seed) & 0xFFFFFFFFFFFFFFFF, reference.dropout_threshold(p), 1.0 / (1.0 - p)


@functools.cache
def base_on_torch(dtype: torch.dtype) -> bool:
    """Whether x W0ᵀ and dy W0 go to torch, and only the low-rank part to the kernels.

    True where torch's matrix product uses hardware that the kernels do not: whatever the generic kernels run on.
    LORA_OPS_CPU_BASE=torch|kernel|auto forces it.
    """
    choice = os.environ.get("LORA_OPS_CPU_BASE", "auto")
    if choice not in ("torch", "kernel", "auto"):
        raise ValueError(f'LORA_OPS_CPU_BASE is "{choice}"; it may be torch, kernel or auto')
    if choice != "auto":
        return choice == "torch"
    return _C.isa() == "generic"


def on_torch(dtype: torch.dtype) -> bool:
    """`base_on_torch`, of a product that is about to be computed."""
    if log.ON and base_on_torch(dtype):
        chosen = os.environ.get("LORA_OPS_CPU_BASE") == "torch"
        why = "LORA_OPS_CPU_BASE is torch" if chosen else f"{_C.isa()} kernels are slower at it"
        log.note(f"torch multiplies by W0, since {why}")
    return base_on_torch(dtype)


# Where torch has them, tensors are looked at through a table of C functions (csrc/tensors.h). `_C.forward_of_tensors` and
# `backward_of_tensors` take any weight, (weight,) or the fields of qlora_ops.Weight, and do their work where all arguments fit
# the kernels as they are; otherwise they return None, and Python asks what does not fit.
if hasattr(Tensor, "__dlpack_c_exchange_api__"):
    _C.use_tensors(Tensor.__dlpack_c_exchange_api__, Tensor, torch.nn.Parameter, torch.empty, tuple(_DTYPES))


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    return x.dtype in _DTYPES and weight.numel() > 0


def forward_kernel(
    rows: Tensor,
    weight: Matrix | FourBit,
    panels: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    y: Tensor,
    general: General | None = None,
) -> Tensor:
    """Writes y (M, N) and returns S (M, r). Without a weight, y already holds x W0ᵀ."""
    if log.ON:
        log.note(f"{log.kernels()}, by addresses")
    (M, K), N, r = rows.shape, y.shape[1], lora_A.shape[0]
    S = torch.empty((M, r), dtype=torch.float32)
    A, B, bias = lora_A.contiguous(), lora_B.contiguous(), None if bias is None else bias.contiguous()
    _C.lora_forward(
        M, K, N, r, matrix(rows), weight, 0 if panels is None else panels.data_ptr(), matrix(A), matrix(B), matrix(bias),
        scaling, *_dropout(seed, dropout_p), matrix(y), S.data_ptr(), torch.get_num_threads(), general,
    )  # fmt: skip
    return S


def backward_kernel(
    g: Tensor,
    x: Tensor | None,
    weight: Matrix | FourBit,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    dx: Tensor | None,
    need_dA: bool,
    need_dB: bool,
    need_dbias: bool,
    *,
    general: General | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes dx (M, K) if there is one, and returns dA, dB, dbias. Without a weight, dx already holds dy W0."""
    (M, N), (r, K) = g.shape, lora_A.shape
    check_kept(x=(x, M * K, need_dA), S=(S, M * r, need_dB))
    A, B = lora_A.contiguous(), lora_B.contiguous()
    rows = rows_of(x) if need_dA and x is not None else None
    dA = torch.empty((r, K) if need_dA else 0, dtype=lora_A.dtype)
    dB = torch.empty((N, r) if need_dB else 0, dtype=lora_B.dtype)
    dbias = torch.empty(N if need_dbias else 0, dtype=torch.float32)
    _C.lora_backward(
        M, K, N, r, matrix(g), matrix(rows), weight, matrix(A), matrix(B),
        0 if S is None else S.data_ptr(), scaling, *_dropout(seed, dropout_p), matrix(dx),
        matrix(dA if need_dA else None), matrix(dB if need_dB else None), matrix(dbias if need_dbias else None),
        torch.get_num_threads(), general,
    )  # fmt: skip
    return dA, dB, dbias


def _lora_forward_cpu(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    panels: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    if y_dtype is None and 0.0 <= dropout_p < 1.0 and not base_on_torch(x.dtype):
        drop, threads = _dropout(seed, dropout_p), torch.get_num_threads()
        done = _C.forward_of_tensors(x, (weight,), lora_A, lora_B, bias, panels, drop, scaling, dropout_p, threads)
        if done is not None:
            return done
    check(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    if not _has_kernel(x, weight):
        return forward_reference(x, weight, lora_A, lora_B, bias, panels, seed, scaling, dropout_p)
    if panels is not None:
        _check_panels(panels, weight, x.dtype)
    N, rows = weight.shape[0], rows_of(x)
    external = panels is None and on_torch(x.dtype)
    y_dtype = y_dtype or x.dtype
    y = (rows @ weight.to(x.dtype).T).to(y_dtype) if external else torch.empty((rows.shape[0], N), dtype=y_dtype)
    weight = _strided(weight)
    S = forward_kernel(rows, None if external else matrix(weight), panels, lora_A, lora_B, bias, seed, scaling, dropout_p, y)
    return y.view(*x.shape[:-1], N), S


def _lora_backward_cpu(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    need_dx: bool,
    *need: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not base_on_torch(dy.dtype):
        drop, threads = _dropout(seed, dropout_p), torch.get_num_threads()
        done = _C.backward_of_tensors(dy, x, (weight,), lora_A, lora_B, S, drop, scaling, (need_dx, *need), threads)
        if done is not None:
            return done
    if not _has_kernel(dy, weight):
        return backward_reference(dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p, need_dx, *need)
    K, g = weight.shape[1], rows_of(dy)
    external = need_dx and base_on_torch(dy.dtype)
    dx = g @ weight.to(g.dtype) if external else torch.empty((g.shape[0], K) if need_dx else 0, dtype=dy.dtype)
    weight = _strided(weight)  # must live as long as the call
    operand = matrix(weight) if need_dx and not external else None
    rest = backward_kernel(g, x, operand, lora_A, lora_B, S, seed, scaling, dropout_p, dx if need_dx else None, *need)
    return dx.view(*dy.shape[:-1], K) if need_dx else dx, *rest


# --- devices and dtypes without a kernel ------------------------------------------------------------------------------


def forward_reference(x, weight, lora_A, lora_B, bias, panels, seed, scaling, dropout_p):  # type: ignore[no-untyped-def]
    if log.ON:
        log.note(log.reference(x, transformed()))
    check(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y, S = reference.lora_forward(rows, weight, lora_A, lora_B, bias, scaling, dropout_p, seed)
    return y.reshape(*x.shape[:-1], weight.shape[0]), S


def backward_reference(dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p, *need):  # type: ignore[no-untyped-def]
    M = math.prod(dy.shape[:-1])
    rows = None if x is None else x.reshape(M, weight.shape[1])
    grads = reference.lora_backward(
        dy.reshape(M, weight.shape[0]), rows, weight, lora_A, lora_B, S, scaling, dropout_p, seed, need=need
    )
    empty = fake_gradients(dy, lora_A, lora_B, False, False, False, False)
    dx, *rest = (e if g is None else g for g, e in zip(grads, empty, strict=True))
    return (dx.reshape(*dy.shape[:-1], weight.shape[1]) if need[0] else dx, *rest)


# --- shapes for the compiler ------------------------------------------------------------------------------------------


def _lora_forward_fake(x, weight, lora_A, lora_B, bias, panels, seed, scaling, dropout_p):  # type: ignore[no-untyped-def]
    check(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    return fake_outputs(x, lora_A, lora_B)


def fake_outputs(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """y and S without their numbers."""
    S_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    M = math.prod(x.shape[:-1])
    return x.new_empty((*x.shape[:-1], lora_B.shape[0])), x.new_empty((M, lora_A.shape[0]), dtype=S_dtype)


def _lora_backward_fake(dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p, *need):  # type: ignore[no-untyped-def]
    return fake_gradients(dy, lora_A, lora_B, *need)


def fake_gradients(
    dy: Tensor, lora_A: Tensor, lora_B: Tensor, need_dx: bool, need_dA: bool, need_dB: bool, need_dbias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        dy.new_empty((*dy.shape[:-1], lora_A.shape[1]) if need_dx else 0),
        lora_A.new_empty(lora_A.shape if need_dA else 0),
        lora_B.new_empty(lora_B.shape if need_dB else 0),
        dy.new_empty(lora_B.shape[0] if need_dbias else 0, dtype=torch.promote_types(dy.dtype, torch.float32)),
    )


# --- registration -----------------------------------------------------------------------------------------------------

_FORWARD = register("lora_forward", _lora_forward_cpu, forward_reference, _lora_forward_fake)
_BACKWARD = register("lora_backward", _lora_backward_cpu, backward_reference, _lora_backward_fake)
lora_forward = Operator(
    _FORWARD, _BACKWARD, 1,
    {False: (log.watched("lora_forward", _lora_forward_cpu, log.DIRECT), _lora_backward_cpu)},
    (log.watched("lora_forward", forward_reference, log.DIRECT), backward_reference),
)  # fmt: skip
register_autograd("lora_forward", lora_forward)


def _wide_cpu(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    if not _has_kernel(x, weight):
        return _wide(x, weight, lora_A, lora_B, scaling)
    return _lora_forward_cpu(x, weight, lora_A, lora_B, None, None, None, scaling, 0.0, torch.float32)


def _wide(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    y, S = _FORWARD(x, weight, lora_A, lora_B, None, None, None, scaling, 0.0)
    return y.to(S.dtype), S


register("lora_forward_wide", _wide_cpu, _wide, _wide)


# --- packed weights ---------------------------------------------------------------------------------------------------


def _check_panels(panels: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    N, K = weight.shape
    size = _C.packed_size(N, K, _DTYPES[dtype], _DTYPES[weight.dtype])
    if panels.dtype != torch.float32 or panels.dim() != 1 or panels.numel() != size or not panels.is_contiguous():
        raise ValueError(
            f"panels must come from pack_weight(weight, {dtype}): {size} contiguous float32, "
            f"got shape {tuple(panels.shape)}, {panels.dtype}"
        )


def pack_weight(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The panels of a CPU weight (N, K) that `lora_forward` takes for an x of `dtype`; None where no kernel would use them.

    fp32 arithmetic keeps fp32 panels (4 bytes per weight, whatever weight's dtype), bf16 arithmetic 2 bytes per weight.
    """
    if weight.device.type != "cpu" or dtype not in _DTYPES or weight.dtype not in _DTYPES or base_on_torch(dtype):
        return None
    N, K = weight.shape
    weight = _strided(weight.detach())
    panels = torch.empty(_C.packed_size(N, K, _DTYPES[dtype], _DTYPES[weight.dtype]), dtype=torch.float32)
    _C.pack_weight(N, K, matrix(weight), _DTYPES[dtype], panels.data_ptr(), torch.get_num_threads())
    return panels
