"""What matters: scores of parameters and of ranks, smoothed over steps."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..training import Path


class Importance:
    """An exponential mean of a score I, times that of its own uncertainty where `beta2` is given:

        Ī ← β₁ Ī + (1 - β₁) I            Ū ← β₂ Ū + (1 - β₂) |I - Ī|            value Ī, or Ī Ū

    Args:
        score: the tensors of I at present.
        beta1, beta2: in [0, 1).
        combine: what makes `value()` of the smoothed tensors, which are in fp32 at least. None: nothing.

    Raises:
        ValueError: a beta out of its range.
    """

    def __init__(
        self,
        score: Callable[[], Sequence[Tensor]],
        beta1: float,
        beta2: float | None = None,
        combine: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ) -> None:
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if beta is not None and not 0 <= beta < 1:
                raise ValueError(f"{name} must be in [0, 1), got {beta}")
        self.score, self.beta1, self.beta2, self.combine = score, beta1, beta2, combine
        self._mean: list[Tensor] = []
        self._uncertainty: list[Tensor] = []

    @torch.no_grad()
    def update(self) -> None:
        scores = self.score()
        if not self._mean:
            wide = [torch.promote_types(s.dtype, torch.float32) for s in scores]
            self._mean, self._uncertainty = (
                [torch.zeros_like(s, dtype=d) for s, d in zip(scores, wide, strict=True)] for _ in range(2)
            )
        for s, mean, uncertainty in zip(scores, self._mean, self._uncertainty, strict=True):
            mean.mul_(self.beta1).add_(s, alpha=1 - self.beta1)
            if self.beta2 is not None:
                uncertainty.mul_(self.beta2).add_((s - mean).abs(), alpha=1 - self.beta2)

    def value(self) -> list[Tensor]:
        """
        Raises:
            RuntimeError: nothing has been scored yet.
        """
        if not self._mean:
            raise RuntimeError("importance must be updated once before it has a value")
        value = self._mean
        if self.beta2 is not None:
            value = [mean * uncertainty for mean, uncertainty in zip(self._mean, self._uncertainty, strict=True)]
        return self.combine(value) if self.combine else value


def sensitivity(parameters: Sequence[Tensor]) -> list[Tensor]:
    """|p · ∂L/∂p|, element by element; 0 without a gradient."""
    return [torch.zeros_like(p) if p.grad is None else (p * p.grad).detach().abs() for p in parameters]


def gradient_magnitude(parameters: Sequence[Tensor]) -> list[Tensor]:
    """|∂L/∂p|; 0 without a gradient."""
    return [torch.zeros_like(p) if p.grad is None else p.grad.detach().abs() for p in parameters]


def component_norms(paths: Sequence[Path], eps: float = 1e-12) -> list[Tensor]:
    """‖b_k c_k a_kᵀ‖ / ‖B diag(c) A‖ of every rank k, Frobenius, a_k a row of A, b_k a column of B, c the gate, (r,) each: the
    numerator is |c_k| ‖a_k‖ ‖b_k‖, and the denominator comes from the r x r Gram matrices."""
    norms = []
    for path in paths:
        A, B = path.lora_A.detach(), path.lora_B.detach()
        if path.gate is not None:
            A = A * path.gate.detach()[:, None]
        gram_A, gram_B = A @ A.T, B.T @ B
        norms.append((gram_A.diagonal() * gram_B.diagonal()).sqrt() / ((gram_A * gram_B).sum().clamp(min=0).sqrt() + eps))
    return norms
