"""Online-LoRA: tasks that nobody announces."""

from collections import deque
from collections.abc import Callable, Sequence
from statistics import fmean, pvariance

import torch
from torch import Tensor, nn

from ..registry import method
from ..training import TrainingMethod
from .merge_restart import MergeAndRestart
from .regularizers import Regularizer, weighted_distance


def output_importance(
    objective: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], samples: Sequence[Tensor], power: int = 1
) -> list[Tensor]:
    """Ω, the mean over samples of |∂ objective / ∂p| to a power.

    MAS (Aljundi et al. 2018, https://arxiv.org/abs/1711.09601): the objective ‖f(x)‖², power 1. The diagonal of the Fisher
    matrix: log p(y | x) with y drawn from p, power 2.
    """
    total = [torch.zeros_like(p) for p in parameters]
    for sample in samples:
        grads = torch.autograd.grad(objective(sample), parameters, allow_unused=True)
        for t, grad in zip(total, grads, strict=True):
            if grad is not None:
                t.add_(grad.abs() ** power, alpha=1 / len(samples))
    return total


class LossDetector:
    """Whether the loss has settled anew: mean and variance of the last `window` values are below thresholds, for the first time
    since the mean was above what it was at the time before, plus a standard deviation."""

    def __init__(self, window: int = 5, *, mean: float, variance: float) -> None:
        self.losses: deque[float] = deque(maxlen=window)
        self.mean, self.variance = mean, variance
        self._peak: float | None = None  # what the mean must exceed first

    def observe(self, loss: float) -> bool:
        self.losses.append(loss)
        mean, variance = fmean(self.losses), pvariance(self.losses)
        if self._peak is not None and mean > self._peak:
            self._peak = None
        full = len(self.losses) == self.losses.maxlen
        if not full or self._peak is not None or mean >= self.mean or variance >= self.variance:
            return False
        self._peak = mean + variance**0.5
        return True


class HardBuffer:
    """The `size` samples with the largest loss among those that it has and those that are shown."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self.samples: list[Tensor] = []

    def update(self, samples: Sequence[Tensor], losses: Sequence[float]) -> None:
        """
        Args:
            samples: new ones, after the buffer's own.
            losses: of all of these.

        Raises:
            ValueError: not one loss for each.
        """
        candidates = [*self.samples, *samples]
        if len(losses) != len(candidates):
            raise ValueError(f"losses must be one for each of {len(candidates)} samples, got {len(losses)}")
        order = sorted(range(len(candidates)), key=losses.__getitem__, reverse=True)
        self.samples = [candidates[i] for i in order[: self.size]]


@method(
    "Online-LoRA",
    equation="when the loss settles: Ω ← mean of importances, W0 ← W0 + s B A, new A, B; + λ/2 Σ Ω (p - p*)²",
    use="method = methods.OnlineLoRA(model, lambda x: model(x).square().sum(), mean=0.5, variance=0.01)",
    changes="L",
    source="Wei et al. 2024, https://arxiv.org/abs/2411.05663",
    test="test_continual.py::test_online_lora_starts_anew",
    note="The official code adds A's and B's, not their products, and sets both to zero: no gradient ever after. Its loop over "
    "parameters is exhausted after the first sample, and its importance is g² of the log-likelihood of the predicted class.",
)
class OnlineLoRA(TrainingMethod):
    """Without knowing tasks: a LoRA is merged and begun anew whenever the loss has settled, and what mattered to hard samples
    is held where the new one begins. Call `observe(loss)` once per step and keep `buffer` filled.

    Args:
        model: `FusedLoraLinear`s with a dense weight.
        objective: of one sample of the buffer, for `output_importance`.
        mean, variance, window: see `LossDetector`.
        weight: λ.
        power: see `output_importance`.

    Raises:
        ValueError, TypeError: see `MergeAndRestart`.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Callable[[Tensor], Tensor],
        *,
        mean: float,
        variance: float,
        window: int = 5,
        weight: float = 2000.0,
        power: int = 1,
        buffer_size: int = 4,
    ) -> None:
        self.objective, self.power = objective, power
        self.detector, self.buffer = LossDetector(window, mean=mean, variance=variance), HardBuffer(buffer_size)
        self.restarts = MergeAndRestart(model, 1)
        self.importance: list[Tensor] = []
        self._anchors: list[Tensor] = []
        super().__init__(Regularizer(weight, self._penalty))

    def attach(self, optimizer: torch.optim.Optimizer) -> "OnlineLoRA":
        self.restarts.attach(optimizer)
        return super().attach(optimizer)

    def observe(self, loss: float) -> bool:
        """Tells the loss of a step; whether that began a new LoRA."""
        if not self.detector.observe(loss):
            return False
        parameters = self._parameters()
        if self.buffer.samples:
            new, k = output_importance(self.objective, parameters, self.buffer.samples, self.power), self.restarts.restarts + 1
            old = self.importance or new
            self.importance = [n / k + o * (1 - 1 / k) for n, o in zip(new, old, strict=True)]
        self.restarts.restart()
        self._anchors = [p.detach().clone() for p in parameters]
        return True

    def _parameters(self) -> list[nn.Parameter]:
        return [p for path in self.restarts.paths for p in (path.lora_A, path.lora_B)]

    def _penalty(self) -> Tensor:
        parameters = self._parameters()
        if not self.importance or not self._anchors:
            return torch.zeros(())
        return weighted_distance(parameters, self.importance, self._anchors)
