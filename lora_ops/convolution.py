"""Convolutions as matrix products, where every element of x is in one window at most."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autograd import transformed
from .functional import lora_linear

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED_BY_TORCH = 3600  # elements from which on torch copies a transposed matrix block by block


class Geometry(NamedTuple):
    """How the windows of a convolution lie: a number for each of its 1, 2 or 3 dimensions."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    @classmethod
    def of(cls, conv: Any) -> "Geometry":
        return cls(*(getattr(conv, field) for field in cls._fields))

    @property
    def is_product(self) -> bool:
        """Whether y is a matrix product of x's elements, each taken once at most: windows that do not overlap, of all
        channels, without padding and without holes."""
        padded = any(width for pair in self._padding_pairs() for width in pair)
        holes = any(d > 1 and k > 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        overlap = any(s < k for s, k in zip(self.stride, self.kernel_size, strict=True))
        return not (padded or holes or overlap) and self.groups == 1

    def _padding_pairs(self) -> list[tuple[int, int]]:
        """Of every dimension, in front and behind."""
        if isinstance(self.padding, tuple):
            return [(p, p) for p in self.padding]
        if self.padding == "valid":
            return [(0, 0)] * len(self.kernel_size)
        totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int | None = None) -> Tensor:
    """What the module of that geometry computes."""
    padding: Any = geometry.padding
    if geometry.padding_mode != "zeros":
        widths = [p for pair in reversed(geometry._padding_pairs()) for p in pair]
        x, padding = F.pad(x, widths, mode=geometry.padding_mode), 0
    conv = _FUNCTIONS[len(geometry.kernel_size)]
    groups = geometry.groups if groups is None else groups
    return conv(x, weight, bias, geometry.stride, padding, geometry.dilation, groups)


def lora_convolve(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, geometry: Geometry, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """A frozen convolution with a low-rank update by one `lora_linear`: the rows of its x are the windows.

    Where x has its channels last in memory, windows of one element are x itself, and so is what comes out, as with torch's
    convolution; otherwise x is transposed once and y is once.

    Args:
        x: (batch, C, ...) or (C, ...).
        weight: (N, C, *kernel_size), frozen.
        lora_A: (r, C · Π kernel_size).
        lora_B: (N, r).
        geometry: one with `is_product`.
        bias, options: `lora_linear`'s.

    Raises:
        ValueError: x has another number of dimensions or channels; what `lora_linear` raises.
    """
    n, C = len(geometry.kernel_size), weight.shape[1]
    if x.dim() not in (n + 1, n + 2) or x.shape[-n - 1] != C:
        raise ValueError(f"x must be (batch, {C}, ...) or ({C}, ...) with {n} more dimensions, got shape {tuple(x.shape)}")
    batch = x if x.dim() == n + 2 else x.unsqueeze(0)
    channels_last = n > 1 and x.dim() == n + 2 and x.stride(1) == 1
    y = lora_linear(_windows(batch, geometry), weight.flatten(1), lora_A, lora_B, bias=bias, **options)
    sizes = y.shape[1:-1]
    y = y.movedim(-1, 1) if channels_last else transposed(y.flatten(1, -2)).unflatten(2, sizes)
    return y if x.dim() == n + 2 else y.squeeze(0)


def _windows(x: Tensor, geometry: Geometry) -> Tensor:
    """(batch, C, ...) as (batch, ..., C · Π kernel_size), the elements of a window in the order of a weight's."""
    n = len(geometry.kernel_size)
    if any(k > 1 for k in geometry.kernel_size):
        for i, (k, s) in enumerate(zip(geometry.kernel_size, geometry.stride, strict=True)):
            x = x.unfold(i + 2, k, s)
        return x.movedim(1, n + 1).flatten(n + 1)
    if any(s > 1 for s in geometry.stride):
        strided: Any = (..., *(slice(None, None, s) for s in geometry.stride))
        x = x[strided]
    if x.stride(1) == 1:
        return x.movedim(1, -1)
    return transposed(x.flatten(2)).unflatten(1, x.shape[2:])


def transposed(t: Tensor) -> Tensor:
    """(b, m, n) as (b, n, m), contiguous. Differentiable."""
    small = t.shape[1] * t.shape[2] < _TRANSPOSED_BY_TORCH
    if t.device.type != "cpu" or small or torch.compiler.is_compiling() or transformed():
        return t.transpose(1, 2).contiguous()
    return _Transposed.apply(t)


class _Transposed(torch.autograd.Function):
    """Matrix by matrix, which torch does block by block, and up to six times as fast as all of them at once."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        result = t.new_empty((t.shape[0], t.shape[2], t.shape[1]))
        for matrix, to in zip(t, result, strict=True):
            to.copy_(matrix.t())
        return result

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> Tensor:
        return transposed(dy[0])
