"""lora_forward and lora_backward on a GPU, kernel by kernel.

    lora_down           S = drop(x) Aᵀ
    lora_forward        y = x W0ᵀ + scaling · S Bᵀ + bias
    lora_backward_up    dS = scaling · dy B, dB = scaling · dyᵀ S, dbias = Σ_rows dy        one pass over dy
    lora_backward_dx    dx = dy W0 + drop'(dS A)
    lora_backward_down  dA = dSᵀ drop(x)

A 4-bit W0 is decoded inside qlora_forward and qlora_backward_dx, in the places of lora_forward and lora_backward_dx; where they
do not take the shape, dequantize_4bit writes it out for the length of the call.

`split` leaves x W0ᵀ and dy W0 to torch (cuBLAS), and the kernels add the rest. Every tensor is torch's, workspaces included;
the dropout seed stays on the device; nothing waits for the GPU.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..ops import matrix, rows_of
from ..qlora_ops import Weight
from ..quant.layout import CHUNK, DTYPES, QUANT_TYPES, row_bytes

HALF = (torch.bfloat16, torch.float16)
_LARGEST = 1 << 30  # of a dimension: kernels count in 32 bits


class Target(NamedTuple):
    """Where kernels run."""

    extension: Any  # lora_ops._C_cuda
    sm_count: int  # fixes, with the shapes, how sums are split and so their order
    stream: int


def has_kernel(x: Tensor, weight: Tensor) -> bool:
    """bf16 and fp16. What is empty, too, goes to the reference."""
    return x.dtype in HALF and x.numel() > 0 and weight.numel() > 0 and max(*x.shape, *weight.shape) < _LARGEST


def _workspace(device: torch.device) -> Callable[[int], Tensor]:
    """What a launcher asks for as many bytes as it needs."""
    return functools.partial(torch.empty, dtype=torch.uint8, device=device)


def _dropout(seed: Tensor | None, p: float) -> tuple[int, int, float]:
    """The address of the seed, which the kernels read on the device."""
    if seed is None:
        return 0, 0, 1.0
    return seed.data_ptr(), reference.dropout_threshold(p), 1.0 / (1.0 - p)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def quantize(target: Target, weight: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """codes and absmax of a weight (N, K). absmax is not finite where an element of its block is not."""
    N, K = weight.shape
    weight = weight.contiguous()
    codes = weight.new_empty((N, row_bytes(K)), dtype=torch.uint8)
    absmax = weight.new_empty(-(-N * K // blocksize), dtype=torch.float32)
    target.extension.quantize_4bit(
        N, K, QUANT_TYPES[quant_type], blocksize, weight.data_ptr(), DTYPES[weight.dtype], codes.data_ptr(),
        absmax.data_ptr(), target.stream,
    )  # fmt: skip
    return codes, absmax


def dequantize(target: Target, weight: Weight, K: int, dtype: torch.dtype) -> Tensor:
    """A 4-bit weight (N, K) in dtype, both levels of its scales undone in one pass."""
    out = weight.codes.new_empty((weight.codes.shape[0], K), dtype=dtype)
    target.extension.dequantize_4bit(*out.shape, weight.for_kernel(), out.data_ptr(), DTYPES[dtype], target.stream)
    return out


def _operand(target: Target, weight: Tensor | Weight, rows: Tensor, K: int, split: bool) -> Tensor | Weight:
    """The weight as what multiplies rows takes it: a kernel, or with `split` torch."""
    if isinstance(weight, Weight):
        aligned = (rows.data_ptr() | weight.codes.data_ptr()) % 16 == 0 and rows.stride(0) % 8 == 0
        decoded_inside = not split and K % CHUNK == 0 and aligned
        return weight if decoded_inside else dequantize(target, weight, K, rows.dtype)
    weight = weight.to(rows.dtype)
    return weight if 1 in weight.stride() else weight.contiguous()


def _for_kernel(weight: Tensor | Weight) -> Any:
    return weight.for_kernel() if isinstance(weight, Weight) else matrix(weight)


def forward(
    target: Target,
    x: Tensor,
    weight: Tensor | Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    split: bool,
) -> tuple[Tensor, Tensor]:
    """y (..., N) and S (M, r)."""
    rows, A, B = rows_of(x), lora_A.contiguous(), lora_B.contiguous()
    (M, K), (N, r) = rows.shape, B.shape
    S = rows.new_empty((M, r), dtype=torch.float32)
    target.extension.lora_down(
        M, K, r, matrix(rows), matrix(A), _dropout(seed, dropout_p), S.data_ptr(), target.sm_count, _workspace(x.device),
        target.stream,
    )  # fmt: skip
    weight = _operand(target, weight, rows, K, split)
    y = rows @ weight.T if split else rows.new_empty((M, N))  # type: ignore[union-attr]
    launch = target.extension.qlora_forward if isinstance(weight, Weight) else target.extension.lora_forward
    launch(
        M, K, N, r, matrix(rows), None if split else _for_kernel(weight), matrix(B),
        matrix(None if bias is None else bias.contiguous()), matrix(y), S.data_ptr(), scaling, target.stream,
    )  # fmt: skip
    return y.view(*x.shape[:-1], N), S


def backward(
    target: Target,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
    need_dbias: bool,
    split: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA, dB, dbias; None for what is not needed."""
    g, A, B = rows_of(dy), lora_A.contiguous(), lora_B.contiguous()
    (M, N), (r, K) = g.shape, A.shape
    mask = _dropout(seed, dropout_p)
    dS = g.new_empty((M, r), dtype=torch.float32) if need_dx or need_dA else None
    dA, dB = A.new_empty(A.shape) if need_dA else None, B.new_empty(B.shape) if need_dB else None
    dbias = g.new_empty(N, dtype=torch.float32) if need_dbias else None
    if dS is not None or need_dB or need_dbias:
        target.extension.lora_backward_up(
            M, N, r, matrix(g), matrix(B), _address(S if need_dB else None), scaling, _address(dS), _address(dB),
            matrix(dbias), target.sm_count, _workspace(dy.device), target.stream,
        )  # fmt: skip
    dx = None
    if need_dx:
        weight = _operand(target, weight, g, K, split)
        dx = g @ weight if split else g.new_empty((M, K))  # type: ignore[operator]
        launch = target.extension.qlora_backward_dx if isinstance(weight, Weight) else target.extension.lora_backward_dx
        launch(
            M, K, N, r, matrix(g), None if split else _for_kernel(weight), matrix(A), matrix(dx), _address(dS), mask,
            target.stream,
        )  # fmt: skip
        dx = dx.view(*dy.shape[:-1], K)
    if need_dA:
        assert x is not None
        rows = rows_of(x)
        target.extension.lora_backward_down(
            M, K, r, _address(dS), matrix(rows), mask, matrix(dA), target.sm_count, _workspace(dy.device), target.stream
        )
    return dx, dA, dB, dbias
