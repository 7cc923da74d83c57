"""What FusedLoraLinear does to a weight in 4 bits and not to a parameter."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import qlora_linear
from ..quant import NF4Weight, layout, quantize_nf4


def is_linear4bit(module: nn.Module) -> bool:
    """Whether the module is bitsandbytes' Linear4bit with a quantised weight. bitsandbytes need not be installed."""
    quantised = isinstance(module, nn.Linear) and getattr(module.weight, "quant_state", None) is not None
    return quantised and type(module).forward.__module__.startswith("bitsandbytes.")


def check_quant(quant: str | None, blocksize: int) -> None:
    """Raises ValueError naming the argument that does not fit, what it is and what it may be."""
    if quant not in (None, *layout.QUANT_TYPES):
        raise ValueError(f'quant must be "nf4", "fp4" or None, got {quant!r}')
    if quant is not None:
        layout.check_code(blocksize, quant)


def quantised(weight: Tensor | NF4Weight, quant: str | None, blocksize: int, double_quant: bool) -> Tensor | NF4Weight:
    """The weight in 4 bits if `quant` asks for it. One that is in 4 bits already stays as it is."""
    if isinstance(weight, NF4Weight):
        if quant not in (None, weight.quant_type):
            raise ValueError(
                f"quant must be None or the layer's own {weight.quant_type!r}: it is in 4 bits already, got {quant!r}"
            )
        return weight
    return weight if quant is None else quantize_nf4(weight, blocksize, double_quant, quant)


def frozen_linear(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias; in 4 bits by `qlora_linear` with an adapter of zeros."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    N, K = weight.shape
    return qlora_linear(x, weight, x.new_zeros((1, K)), x.new_zeros((N, 1)), scaling=0.0, bias=bias)


def requantise(weight: NF4Weight, merged: Tensor) -> tuple[NF4Weight, float]:
    """`merged` in weight's format, and the relative Frobenius error of that."""
    new = quantize_nf4(merged.float(), weight.blocksize, weight.nested_absmax is not None, weight.quant_type)
    norm = merged.norm()
    error = (new.dequantize(torch.float32) - merged).norm() / norm
    return new.to(weight.dtype), error.item() if norm > 0 else 0.0


def applied(weight: NF4Weight, fn: Callable[[Tensor], Tensor]) -> NF4Weight:
    """What `nn.Module._apply` does to parameters: codes and scales move and keep their dtypes, `weight.dtype` follows.

    A cast to float64 leaves it: there is no such 4-bit weight, and float64 arithmetic takes each product exactly anyway.
    """

    def as_bytes(t: Tensor) -> Tensor:  # a cast takes floating tensors only
        return fn(t.reshape(-1).view(torch.uint8)).view(t.dtype).view(t.shape)

    dtype = fn(torch.empty(0, dtype=weight.dtype, device=weight.device)).dtype
    moved = weight.apply(as_bytes)
    return moved.to(dtype) if dtype in layout.DTYPES else moved


def split_state(state_dict: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of the layer's 4-bit weight, and the others."""
    key = f"{prefix}weight"
    weight = {k: v for k, v in state_dict.items() if k == key or k.startswith(f"{key}.")}
    return weight, {k: v for k, v in state_dict.items() if k not in weight}


def loaded(state: Mapping[str, Any], prefix: str, old: NF4Weight, assign: bool) -> NF4Weight:
    """The state's weight in place of `old`: on its device, with its dtype unless `assign`.

    Raises:
        KeyError, ValueError, TypeError: what is missing or damaged, by its key.
    """
    new = NF4Weight.from_bitsandbytes(state, prefix)
    if new.shape != old.shape:
        raise ValueError(f"{prefix}weight must have shape {old.shape}, got {new.shape}")
    return new if assign else new.to(old.device, old.dtype)
