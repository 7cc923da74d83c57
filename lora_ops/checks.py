"""What the arguments of an operator must be."""

import math

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> None:
    """Raises ValueError or TypeError naming the argument that does not fit, what it is and what it may be."""
    if weight.dim() != 2:
        raise ValueError(f"weight must be (N, K), got shape {tuple(weight.shape)}")
    N, K = weight.shape
    check_beside(x, (N, K), weight, lora_A, lora_B, bias, scaling, dropout_p)


def check_beside(
    x: Tensor,
    shape: tuple[int, int],
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> None:
    """What lies beside a weight of shape (N, K), and the weight's own dtype and device unless it is in 4 bits."""
    N, K = shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x must be (..., K) with K = {K} as in weight {(N, K)}, got shape {tuple(x.shape)}")
    if lora_A.dim() != 2 or lora_A.shape[1] != K:
        raise ValueError(f"lora_A must be (r, K) with K = {K}, got shape {tuple(lora_A.shape)}")
    r = lora_A.shape[0]
    if r < 1:
        raise ValueError(f"lora_A must be (r, K) with r >= 1, got shape {tuple(lora_A.shape)}")
    if lora_B.dim() != 2 or lora_B.shape[0] != N or lora_B.shape[1] != r:
        raise ValueError(f"lora_B must be (N, r) = {(N, r)}, got shape {tuple(lora_B.shape)}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != N):
        raise ValueError(f"bias must be (N,) = {(N,)}, got shape {tuple(bias.shape)}")
    if not -math.inf < scaling < math.inf:  # isfinite takes no symbol of torch.compile
        raise ValueError(f"scaling must be finite, got {scaling}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")

    check_kinds(x, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias)
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(f"lora_A and lora_B must have one dtype, got {lora_A.dtype} and {lora_B.dtype}")


def check_kinds(x: Tensor, **beside: Tensor | None) -> None:
    """Dtype and device of what lies beside x."""
    dtype, device = x.dtype, x.device
    if dtype not in _FLOATING:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {dtype}")
    # fp32 parameters under a half-precision x: PEFT's adapters, and what autocast makes of fp32 models.
    half = dtype in _HALF
    for name, t in beside.items():
        if t is None:
            continue
        if t.dtype != dtype and not (half and t.dtype == torch.float32):
            raise TypeError(f"{name} must have x's dtype {dtype}{' or float32' if half else ''}, got {t.dtype}")
        if t.device != device:
            raise ValueError(f"{name} must be on x's device {device}, got {t.device}")


# --- CPU --------------------------------------------------------------------------------------------------------------


def check_kept(**kept: tuple[Tensor | None, int, bool]) -> None:
    """Raises ValueError for what a backward lacks: tensors by name, how many elements they must have, and whether at all."""
    for name, (t, count, needed) in kept.items():
        if needed and (t is None or t.numel() != count):
            got = "None" if t is None else f"shape {tuple(t.shape)}"
            raise ValueError(f"{name} must have {count} elements for the gradients that are asked for, got {got}")
        if needed and name == "S" and t is not None and t.dtype != torch.float32:
            raise TypeError(f"S must be float32, got {t.dtype}")
