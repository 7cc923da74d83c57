"""FLOPs of the operators for torch.utils.flop_counter: those of the matrix products that the equations have, two per
multiply-add, as torch counts the same layer in eager mode.

A weight in 4 bits counts as a dense one. Decoding, dropout, gates, scales and what a backward computes again count nothing.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from . import dora, general_ops, multi_ops, ops, qlora_ops  # noqa: F401  (what they define is what is counted)

_OPS = torch.ops.lora_ops
_4BIT = 6  # arguments of a weight in 4 bits beyond a dense one's


def _forward_flops(x: Any, lora_A: Any, lora_B: Any, core: Any = None) -> int:
    """Of shapes: y = x W0ᵀ + ((x Aᵀ) core) Bᵀ."""
    M, (N, r), K = math.prod(x[:-1]), lora_B, lora_A[1]
    return 2 * M * (N * K + r * (K + N) + (0 if core is None else r * r))


def _backward_flops(dy: Any, lora_A: Any, lora_B: Any, need: Any, core: Any = None) -> int:
    """Of shapes and needs in the operators' order, dx, dA, dB, dbias, dgate, dcore, dout_scale:

    dS2 = dy B, dS = dS2 coreᵀ, dx = dy W0 + dS A, dA = dSᵀ x, dB = dyᵀ S, dcore = Sᵀ dS2, each if something asks for it.
    """
    M, (N, r), K = math.prod(dy[:-1]), lora_B, lora_A[1]
    dx, dA, dB, _, dgate, dcore, _ = (*need, False, False, False)[:7]
    dS = dx or dA or dgate
    core_flops = 0 if core is None else r * r * (dS + dcore)
    return 2 * M * (dx * K * (N + r) + dA * K * r + dB * N * r + (dS or dcore) * N * r + core_flops)


def _register(forward: Any, backward: Any, wide: Any, skip: int) -> None:
    @register_flop_formula([forward, wide])
    def _(x: Any, weight: Any, *args: Any, **_: Any) -> int:
        lora_A, lora_B = args[skip : skip + 2]
        return _forward_flops(x, lora_A, lora_B)

    @register_flop_formula(backward)
    def _(dy: Any, x: Any, weight: Any, *args: Any, **_: Any) -> int:
        lora_A, lora_B = args[skip : skip + 2]
        return _backward_flops(dy, lora_A, lora_B, args[-4:])


_register(_OPS.lora_forward, _OPS.lora_backward, _OPS.lora_forward_wide, 0)
_register(_OPS.qlora_forward, _OPS.qlora_backward, _OPS.qlora_forward_wide, _4BIT)


@register_flop_formula(_OPS.lora_general_forward)
def _general_forward(x, weight, blocksize, quant_type, lora_A, lora_B, bias, gate, core, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return _forward_flops(x, lora_A, lora_B, core)


@register_flop_formula(_OPS.lora_general_backward)
def _general_backward(dy, x, weight, blocksize, quant_type, lora_A, lora_B, gate, core, *args, **_) -> int:  # type: ignore[no-untyped-def]
    return _backward_flops(dy, lora_A, lora_B, args[-7:], core)


@register_flop_formula(_OPS.weight_products)
def _weight_products(weight, lora_A, lora_B, **_) -> int:  # type: ignore[no-untyped-def]
    return _forward_flops(lora_A, lora_A, lora_B)


def _rows_of_adapters(adapter_ids: Tensor, lora_A: list[Tensor]) -> list[int]:
    """How many rows each adapter has. Without numbers to look at, all rows have the one of the largest rank."""
    if isinstance(adapter_ids, FakeTensor) or adapter_ids.is_meta:
        largest = max(range(len(lora_A)), key=lambda i: lora_A[i].shape[0], default=None)
        return [adapter_ids.numel() if i == largest else 0 for i in range(len(lora_A))]
    return [int((adapter_ids == i).sum()) for i in range(len(lora_A))]


@register_flop_formula(_OPS.multi_lora_forward, get_raw=True)
def _multi_forward(x, weight, K, blocksize, quant_type, lora_A, lora_B, scalings, adapter_ids, *_, **__) -> int:  # type: ignore[no-untyped-def]
    N, rows = weight[0].shape[0], _rows_of_adapters(adapter_ids, lora_A)
    return 2 * adapter_ids.numel() * N * K + sum(2 * n * A.shape[0] * (K + N) for n, A in zip(rows, lora_A, strict=True))


@register_flop_formula(_OPS.multi_lora_backward, get_raw=True)
def _multi_backward(  # type: ignore[no-untyped-def]
    dy, x, weight, K, blocksize, quant_type, lora_A, lora_B, scalings, adapter_ids, *args, **_
) -> int:
    need_dx, need_dA, need_dB, _need_dbias = args[-4:]
    N, rows = weight[0].shape[0], _rows_of_adapters(adapter_ids, lora_A)
    total = 2 * need_dx * (adapter_ids.numel() - sum(rows)) * N * K  # of rows without an adapter
    for n, A, B, dA, dB in zip(rows, lora_A, lora_B, need_dA, need_dB, strict=True):
        total += _backward_flops((n, N), A.shape, B.shape, (need_dx, dA, dB, False))
    return total
