"""Random tensors that a seed makes anew, and sums of them that do not keep them."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_BLOCK = 1 << 20  # numbers that exist at a time, of all directions


def directions(count: int, shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """`count` random tensors of a shape, uniform in ±1/√count, in blocks of several, (..., *shape).

    They come from torch's CPU generator, so that an adapter that was trained on one device is the same on another.
    """
    generator = torch.Generator().manual_seed(seed)
    in_block = max(1, _BLOCK // math.prod(shape))
    bound = count**-0.5
    for start in range(0, count, in_block):
        block = torch.empty(min(in_block, count - start), *shape)
        yield block.uniform_(-bound, bound, generator=generator).to(dtype)


def combination(coefficients: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """Σ_k coefficients_k · direction_k of `directions`, and in the backward dcoefficients_k = <dout, direction_k>, for which
    nothing is kept. The memory that either takes does not depend on how many there are."""
    return _combination(coefficients, list(shape), seed)


@torch.library.custom_op("lora_ops::combination", mutates_args=())
def _combination(coefficients: Tensor, shape: list[int], seed: int) -> Tensor:
    wide = torch.promote_types(coefficients.dtype, torch.float32)
    total = torch.zeros(shape, dtype=wide, device=coefficients.device)
    start = 0
    for block in directions(len(coefficients), shape, seed, wide):
        part = coefficients[start : start + len(block)].to(wide)
        total += torch.tensordot(part, block.to(total.device), dims=1)
        start += len(block)
    return total.to(coefficients.dtype)


@torch.library.custom_op("lora_ops::combination_backward", mutates_args=())
def _combination_backward(dout: Tensor, count: int, seed: int) -> Tensor:
    wide = torch.promote_types(dout.dtype, torch.float32)
    flat, blocks = dout.to(wide).flatten(), directions(count, dout.shape, seed, wide)
    return torch.cat([block.to(flat.device).flatten(1) @ flat for block in blocks]).to(dout.dtype)


_combination.register_fake(lambda coefficients, shape, seed: coefficients.new_empty(shape))
_combination_backward.register_fake(lambda dout, count, seed: dout.new_empty(count))


def _keep(ctx: Any, inputs: tuple[Tensor, list[int], int], output: Tensor) -> None:
    ctx.count, ctx.seed = len(inputs[0]), inputs[2]


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
    return _combination_backward(dout, ctx.count, ctx.seed), None, None


_combination.register_autograd(_differentiate, setup_context=_keep)
