"""Proximal steps."""

import torch
from torch import Tensor


@torch.no_grad()
def prox_l1_(gate: Tensor, threshold: float) -> Tensor:
    """g ← sign(g) · max(|g| - threshold, 0), in place: the proximal step of threshold · ‖g‖₁.

    Raises:
        ValueError: threshold below 0.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must be >= 0, got {threshold}")
    return gate.copy_(gate.sign() * (gate.abs() - threshold).clamp(min=0))
