"""Terms beside the loss. Each is a function of parameters; `Regularizer` adds its gradient after the backward."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..training import Path, TrainingMethod


class Regularizer(TrainingMethod):
    """Adds the gradient of weight · term() to the gradients: what adding it to the loss would do, without touching the loss.

    Gradients that are scaled (fp16) must be unscaled before, and clipping does not see the term if it came first.

    Args:
        weight: finite, 0 leaves the term out.
        term: a scalar, differentiable in parameters that train.
        until: the last step at which it acts, None: always.
    """

    def __init__(self, weight: float, term: Callable[[], Tensor], until: float | None = None) -> None:
        super().__init__()
        self.weight, self.term, self.until = weight, term, until

    def on_backward(self, step: int) -> None:
        if self.weight and (self.until is None or step <= self.until):
            value = self.weight * self.term()
            if value.requires_grad:
                value.backward()


def orthogonality(paths: Sequence[Path]) -> Tensor:
    """The mean, over every A and B, of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖, Frobenius."""
    grams = [A @ A.T for A in (path.lora_A for path in paths)] + [B.T @ B for B in (path.lora_B for path in paths)]
    return torch.stack([torch.linalg.matrix_norm(g - torch.eye(len(g), dtype=g.dtype, device=g.device)) for g in grams]).mean()


def subspace_overlap(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ |A_old Aᵀ| over pairs (A_old, A): zero if and only if their rows are orthogonal, so that A does not see what A_old
    sees."""
    return torch.stack([(old.detach() @ new.T).abs().sum() for old, new in pairs]).sum()


def factor_variance(paths: Sequence[Path]) -> Tensor:
    """The mean variance of A's rows and of B's columns."""
    return torch.cat([torch.cat([path.lora_A.var(dim=1), path.lora_B.var(dim=0)]) for path in paths]).mean()


def mean_magnitude(gates: Sequence[Tensor]) -> Tensor:
    """The mean of |g| over all gates' elements."""
    return torch.cat([g.abs().reshape(-1) for g in gates]).mean()


def binary_entropy(gates: Sequence[Tensor]) -> Tensor:
    """The mean of -g log g - (1 - g) log(1 - g) over all gates' elements, in [0, 1]: zero if and only if each is 0 or 1."""
    g = torch.cat([g.reshape(-1) for g in gates])
    return -(torch.special.xlogy(g, g) + torch.special.xlog1py(1 - g, -g)).mean()


def total_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Σ ‖p‖, Frobenius."""
    return torch.stack([torch.linalg.vector_norm(p) for p in parameters]).sum()


def weighted_distance(parameters: Sequence[Tensor], weights: Sequence[Tensor], anchors: Sequence[Tensor]) -> Tensor:
    """½ Σ Ω (p - p*)²: what matters stays where it was (MAS, EWC)."""
    terms = [(w * (p - anchor).square()).sum() for p, w, anchor in zip(parameters, weights, anchors, strict=True)]
    return 0.5 * torch.stack(terms).sum()
