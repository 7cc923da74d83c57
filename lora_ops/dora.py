"""DoRA: a layer whose rows keep their direction from W0 + ΔW and have lengths of their own."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .functional import lora_linear, qlora_linear
from .nn.quantized import linear_4bit
from .quant import NF4Weight

_ROWS = 512  # of the weight, widened at a time


def row_norms(weight: Tensor | NF4Weight) -> Tensor:
    """‖W0‖² of every row, (N,), in fp32 (fp64 for fp64). W0 is frozen: whoever calls `dora_linear` often may keep it, most of
    all of a weight in 4 bits, which is decoded for it as a whole."""
    dense = weight.dequantize(torch.float32) if isinstance(weight, NF4Weight) else weight
    return torch.cat([rows.square().sum(1) for rows in _wide_rows(dense)])


@torch.no_grad()
def weight_norm(
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    base: Tensor | None = None,
) -> Tensor:
    """‖W0 + scaling · B A‖ of every row, (N,), without W0 + B A:

        n² = ‖W0‖² + 2 scaling · Σ_r (W0 Aᵀ ∘ B) + scaling² · Σ_r (B (A Aᵀ) ∘ B)

    The three terms are summed in fp32 (fp64 for fp64). Where they cancel, which takes a ΔW about as large as W0 and against
    it, n loses as many digits as the sum does.

    Args:
        weight: W0, (N, K), dense or in 4 bits.
        lora_A, lora_B, scaling: (r, K), (N, r), a number.
        base: `row_norms(weight)`, where it is known.
    """
    base = row_norms(weight) if base is None else base
    A, B = lora_A.to(base.dtype), lora_B.to(base.dtype)
    if isinstance(weight, NF4Weight):
        with_A = linear_4bit(A, weight, None).T
    else:
        with_A = torch.cat([rows @ A.T for rows in _wide_rows(weight)])
    squares = base + scaling * ((2 * with_A + scaling * (B @ (A @ A.T))) * B).sum(1)
    return squares.clamp_min(0).sqrt()


def dora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    base: Tensor | None = None,
) -> Tensor:
    """y = c ∘ (x W0ᵀ + scaling · (x Aᵀ) Bᵀ) + bias with c = magnitude / ‖W0 + scaling · B A‖, a length for every row.

    DoRA: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024 (https://arxiv.org/abs/2402.09353). As in its
    section 4.3 the norm is a constant of the backward. Neither ΔW nor W0 + ΔW is formed: `weight_norm`.

    With dropout, x̃ = drop(x) takes x's place in everything that training changes, as in PEFT:

        y = x W0ᵀ + (c - 1) ∘ x̃ W0ᵀ + c ∘ scaling · (x̃ Aᵀ) Bᵀ + bias

    Args:
        x, weight, lora_A, lora_B, scaling, bias, dropout_p, training: as in `lora_linear`, or with a weight in 4 bits as in
            `qlora_linear`.
        magnitude: (N,), trainable. ‖W0 + scaling · B A‖ at the start of training, so that the layer starts as W0.
        base: `row_norms(weight)`, where it is known.

    Returns:
        (..., N), in the dtype that `lora_linear` gives.

    Raises:
        ValueError, TypeError: as `lora_linear`; a magnitude of another shape.
    """
    if magnitude.shape != (lora_B.shape[0],):
        raise ValueError(f"magnitude must be (N,) = ({lora_B.shape[0]},) as lora_B {tuple(lora_B.shape)}, got {tuple(magnitude.shape)}")
    c = magnitude / weight_norm(weight, lora_A, lora_B, scaling, base).to(magnitude.dtype)
    linear = qlora_linear if isinstance(weight, NF4Weight) else lora_linear
    hidden, kept = None, x
    if training and dropout_p != 0.0:
        kept = torch.nn.functional.dropout(x, dropout_p)
        hidden = x - kept
    y = linear(kept, weight, lora_A, lora_B, scaling=scaling)  # type: ignore[arg-type]
    out = y * c
    if hidden is not None:
        none_A, none_B = torch.zeros_like(lora_A[:1]), torch.zeros_like(lora_B[:, :1])
        out = out + linear(hidden, weight, none_A, none_B, scaling=1.0)  # type: ignore[arg-type]
    return (out if bias is None else out + bias).to(y.dtype)


def _wide_rows(weight: Tensor) -> Iterator[Tensor]:
    for rows in weight.detach().split(_ROWS):
        yield rows.to(torch.promote_types(weight.dtype, torch.float32))
