"""Which experts a row goes to, and whether they share the work."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SoftmaxRouter(nn.Module):
    """g = softmax(x Wᵀ), (..., num_experts), in fp32; with `top_k`, of the k largest alone, and 0 for the others.

    The product is x's dtype's, so that x is read as it is.

    Args:
        in_features, num_experts: W is (num_experts, in_features), normal with standard deviation 0.02 at first.
        top_k: None: every expert has its weight.

    Raises:
        ValueError: top_k is not in [1, num_experts].
    """

    def __init__(self, in_features: int, num_experts: int, top_k: int | None = None) -> None:
        if top_k is not None and not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be in [1, {num_experts}], the number of experts, or None, got {top_k}")
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, in_features) * 0.02)
        self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.weight.to(x.dtype))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.top_k is not None:
            kept = logits.topk(self.top_k, dim=-1)
            logits = torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)
        return logits.softmax(-1)


def load_balancing_loss(gate: Tensor, chosen: Tensor) -> Tensor:
    """E · Σ_e f_e p_e, 1 where all experts get their share: f_e is what part of the choices fell on e (no gradient), p_e the
    mean of its weight before the choice (Fedus et al. 2021, https://arxiv.org/abs/2101.03961).

    Args:
        gate: (..., E), a softmax over all experts.
        chosen: (..., top_k), the experts that got the row.
    """
    E = gate.shape[-1]
    share = torch.bincount(chosen.flatten(), minlength=E) / chosen.numel()
    return E * (share.to(gate.dtype) * gate.reshape(-1, E).mean(0)).sum()
