"""What a provider returns, and what providers need to know of a layer."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn.linear import weight_of
from ..quant import NF4Weight


class Factors(NamedTuple):
    """Of y = out_scale ∘ (x W0ᵀ + scaling · (((x Aᵀ) ∘ gate) core) Bᵀ) + bias, all but W0, scaling and bias."""

    lora_A: Tensor  # (r, K)  # noqa: N815
    lora_B: Tensor  # (N, r)  # noqa: N815
    gate: Tensor | None = None  # (r,), or (..., r) with the leading dimensions of x
    core: Tensor | None = None  # (r, r)
    out_scale: Tensor | None = None  # (N,)


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(N, K) of nn.Linear, transformers' Conv1D or bitsandbytes' Linear4bit.

    Raises:
        TypeError: another layer.
    """
    N, K = weight_of(linear)[0].shape
    return N, K


def widest(linears: Iterable[nn.Module]) -> tuple[int, int]:
    """(largest N, largest K) of several layers, which need not be of one layer: the size of what they can all share.

    Raises:
        ValueError: there are none.
        TypeError: one is no linear layer.
    """
    shapes = [shape_of(linear) for linear in linears]
    if not shapes:
        raise ValueError("linears must hold at least one layer, got none")
    return max(N for N, _ in shapes), max(K for _, K in shapes)


@torch.no_grad()
def wide_weight(linear: nn.Module) -> Tensor:
    """W0, (N, K), in fp32, or fp64 where it is fp64. Dequantised where it is in 4 bits."""
    weight, _ = weight_of(linear)
    if isinstance(weight, NF4Weight):
        return weight.dequantize(torch.float32)
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def check_positive(**values: int) -> None:
    """Raises ValueError naming the argument that is no integer >= 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def check_divides(divisor_name: str, divisor: int, **of: int) -> None:
    """Raises ValueError where the divisor does not divide one of the others."""
    check_positive(**{divisor_name: divisor})
    for name, value in of.items():
        if value % divisor:
            raise ValueError(f"{divisor_name} must divide {name} = {value}, got {divisor}")


def check_rank(r: int, shape: tuple[int, int]) -> None:
    """Raises ValueError for a rank that a matrix of that shape does not have."""
    check_positive(r=r)
    if r > min(shape):
        raise ValueError(f"r must be at most min(N, K) = {min(shape)}, got {r}")
