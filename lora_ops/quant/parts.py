"""Rows or columns of a 4-bit weight as a 4-bit weight: the same codes, and scales that decode to the same numbers."""

import math
from typing import TYPE_CHECKING

from torch import Tensor

from .. import reference
from . import layout

if TYPE_CHECKING:
    from .weight import NF4Weight


def part(weight: "NF4Weight", dim: int, first: int, end: int) -> "NF4Weight":
    """weight[first:end] (dim 0) or weight[:, first:end] (dim 1), with memory of its own: to the last bit what those are.

    Blocks of scales run across rows. Where a cut falls into one, the part has smaller blocks, each with the scale of the block
    that it lies in. Double quantisation stays for rows that begin where one of its groups does (256 blocks), as the halves of
    a large weight do; otherwise the part has float32 scales, 32 / blocksize bits per weight.

    Raises:
        ValueError: dim is neither 0 nor 1, the range is empty or not in the weight, or the cut falls into 32 neighbours, which
            no block of scales can follow.
    """
    blocksize = blocksize_of_part(weight, dim, first, end)
    N, K = weight.shape
    codes = _codes(weight, dim, first, end)
    shape = (end - first, K) if dim == 0 else (N, end - first)
    start, blocks = first * K // blocksize, -(-shape[0] * shape[1] // blocksize)
    nested: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    whole_groups = weight.nested_absmax is not None and start % reference.NESTED_BLOCKSIZE == 0
    if dim == 0 and blocksize == weight.blocksize and whole_groups:
        absmax = weight.absmax[start : start + blocks].clone()
        groups = slice(start // reference.NESTED_BLOCKSIZE, -(-(start + blocks) // reference.NESTED_BLOCKSIZE))
        nested = (weight.nested_absmax[groups].clone(), weight.nested_code.clone(), weight.offset.clone())  # type: ignore[index,union-attr]
    else:
        absmax = weight.dequantize_absmax().repeat_interleave(weight.blocksize // blocksize)
        if dim == 0:
            absmax = absmax[start : start + blocks].clone()
        else:
            rows = absmax[: N * K // blocksize].view(N, K // blocksize)
            absmax = rows[:, first // blocksize : end // blocksize].reshape(-1).contiguous()
    return type(weight)(codes, absmax, *nested, shape, weight.dtype, blocksize, weight.quant_type)


def blocksize_of_part(weight: "NF4Weight", dim: int, first: int, end: int) -> int:
    """Of a part, which raises the same errors."""
    K = weight.shape[1]
    if dim not in (0, 1):
        raise ValueError(f"dim must be 0 (rows) or 1 (columns), got {dim!r}")
    if not 0 <= first < end <= weight.shape[dim]:
        raise ValueError(f"first and end must be in 0...{weight.shape[dim]} and not empty, got {first} and {end}")
    cuts = (first * K,) if dim == 0 else (first, end, K)
    blocksize = math.gcd(weight.blocksize, *cuts)
    if blocksize not in layout.BLOCKSIZES:
        what = f"rows of {K} from {first} on" if dim == 0 else f"columns {first} to {end} of {K}"
        raise ValueError(f"{what}: the cut must fall between blocks of at least {layout.BLOCKSIZES[0]} weights with one scale")
    return blocksize


def _codes(weight: "NF4Weight", dim: int, first: int, end: int) -> Tensor:
    if dim == 0:
        return weight.codes[first:end].clone()
    return layout.pack_codes(layout.unpack_codes(weight.codes, weight.shape[1])[:, first:end], weight.quant_type)
