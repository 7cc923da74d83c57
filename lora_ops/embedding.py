"""The low-rank term of an embedding."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .functional import lora_linear, without_autocast


def add_low_rank(
    y: Tensor,
    looked_up: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float | Tensor],
    embed_scale: float | Tensor | None = None,
) -> Tensor:
    """y + embed_scale · Σ_i scaling_i · S_i B_iᵀ, where S_i are rows of A_iᵀ.

    LoRA of embeddings: Hu et al. 2022 (https://arxiv.org/abs/2106.09685), in the form of its authors' loralib, where A starts
    at zero and B does not.

    Args:
        y: (..., N), what the frozen embedding returned.
        looked_up: S_i, (..., r_i).
        lora_Bs: B_i, (N, r_i).
        scalings: of each, numbers or tensors without dimensions.
        embed_scale: what the embedding multiplies its rows by, a number or a tensor of one element.

    Returns:
        (..., N) in y's dtype. The sum is kept in the adapters' dtype, where that is the wider one, and rounded once. Bits do
        not depend on the number of threads.
    """
    wide = y.dtype
    for B in lora_Bs:
        wide = torch.promote_types(wide, B.dtype)
    total = y.reshape(-1, y.shape[-1]).to(wide)
    with without_autocast(y.device):  # which would round y
        for S, B, scaling in zip(looked_up, lora_Bs, scalings, strict=True):
            S, B = S.reshape(-1, S.shape[-1]).to(wide), B.to(wide)
            if embed_scale is not None:
                S = S * (embed_scale.to(wide) if isinstance(embed_scale, Tensor) else embed_scale)
            if isinstance(scaling, Tensor):
                S, scaling = S * scaling, 1.0
            # A linear layer's term where W0 is zero and A the identity: S I = S.
            r = S.shape[1]
            total = total + lora_linear(S, B.new_zeros(B.shape), torch.eye(r, dtype=wide, device=S.device), B, scaling=scaling)
    return total.to(y.dtype).view(y.shape)
