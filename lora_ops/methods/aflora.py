"""AFLoRA: factors freeze, one by one."""

import torch
from torch import nn

from ..registry import method
from ..training import TrainingMethod, low_rank_paths
from .allocation import CubicSchedule
from .importance import Importance, gradient_magnitude, sensitivity

SCORES = {"gradient": gradient_magnitude, "sensitivity": sensitivity}


@method(
    "AFLoRA",
    equation="y = x W0ᵀ + (((x Aᵀ) ∘ d) Bᵀ) ∘ b; every 10 steps A and B whose mean score Ī Ū is below a threshold freeze",
    use="method = methods.AFLoRA(model, first=100, last=500)",
    changes="PL",
    source="Liu et al. 2024, https://arxiv.org/abs/2403.13269",
    test="test_training.py::test_aflora_freezes_for_good",
    note="The official code scores |∂L/∂p|, where AdaLoRA, from which it has mean and uncertainty, scores |p ∂L/∂p|; computes "
    "a scaling that it does not use; and freezes A and B of square layers from the start.",
)
class AFLoRA(TrainingMethod):
    """Freezes A's and B's whole, while gates and output vectors train on.

    The share of elements that may train falls as a cube from 1 at step `first` to 0 at `last`. The threshold is the score that
    this share of all elements exceeds; a matrix freezes if its mean score is not above it, and never thaws.

    Args:
        model: with LoRA.
        first, last, every: steps.
        score: "gradient", |∂L/∂p|, or "sensitivity", |p · ∂L/∂p|.
        beta1, beta2: see `Importance`.

    Raises:
        ValueError: no layer with LoRA, or an argument out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        first: int,
        last: int,
        *,
        every: int = 10,
        score: str = "gradient",
        beta1: float = 0.85,
        beta2: float = 0.95,
    ) -> None:
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        self.factors = [p for path in low_rank_paths(model) for p in (path.lora_A, path.lora_B)]
        self.schedule = CubicSchedule(1.0, 0.0, first, last, every)
        self.importance = Importance(lambda: SCORES[score](self.factors), beta1, beta2)

    def on_backward(self, step: int) -> None:
        self.importance.update()

    @torch.no_grad()
    def on_step(self, step: int) -> None:
        if not self.schedule.due(step):
            return
        values = self.importance.value()
        flat = torch.cat([v.reshape(-1) for v in values])
        frozen = flat.numel() - int(self.schedule(step) * flat.numel())
        if frozen == 0:
            return
        threshold = flat.kthvalue(frozen).values
        for p, value in zip(self.factors, values, strict=True):
            if p.requires_grad and (frozen == flat.numel() or value.mean() <= threshold):
                p.requires_grad_(False)
                p.grad = None
                if self.optimizer is not None:
                    self.optimizer.state.pop(p, None)
