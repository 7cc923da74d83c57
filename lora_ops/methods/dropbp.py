"""DropBP: some branches get no backward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import method
from ..training import TrainingMethod


def drop_backward(x: Tensor, h: Tensor, p: float, *, training: bool = True, generator: torch.Generator | None = None) -> Tensor:
    """x + h, whose gradient does not reach h with probability p, drawn once per call.

    Raises:
        ValueError: p is not in [0, 1].
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    return x + (h.detach() if training and p > 0 and _drawn(p, generator) else h)


def _drawn(p: float, generator: torch.Generator | None) -> bool:
    return float(torch.rand((), generator=generator)) < p


@method(
    "DropBP",
    equation="x + h(x) forward; with probability p of the branch, the gradient passes x alone",
    use="method = methods.DropBP([linear], rate=0.5)",
    changes="L",
    source="Woo et al. 2024, https://arxiv.org/abs/2402.17812",
    test="test_dropbp.py::test_dropped_branches_have_no_backward",
)
class DropBP(TrainingMethod):
    """Runs each branch of residual blocks without gradient at random, anew in every training forward, so that it saves nothing
    for the backward either. Outputs do not change. Where all that trains was dropped, the loss requires no gradient: leave such
    a step out.

    Args:
        branches: modules whose output is added to what goes around them (of a transformer: attention, MLP), each used once.
        rate: probability for all, or one each, in [0, 1]. See `allocate`.
        generator: None: torch's default of the CPU.

    Raises:
        ValueError: a rate out of its range, or not one for each.
    """

    def __init__(
        self, branches: Sequence[nn.Module], rate: float | Sequence[float] = 0.5, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.branches = list(branches)
        self.rates = [float(rate)] * len(self.branches) if isinstance(rate, int | float) else [float(p) for p in rate]
        if len(self.rates) != len(self.branches) or not all(0 <= p <= 1 for p in self.rates):
            raise ValueError(f"rate must be in [0, 1], one or {len(self.branches)}, got {rate}")
        self.generator = generator
        self._modes: list[bool] = []
        self._handles = []
        for i, branch in enumerate(self.branches):
            self._handles.append(branch.register_forward_pre_hook(self._enter(i)))
            self._handles.append(branch.register_forward_hook(self._leave, always_call=True))

    def _enter(self, i: int) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            self._modes.append(torch.is_grad_enabled())
            if self._modes[-1] and module.training and self.rates[i] > 0 and _drawn(self.rates[i], self.generator):
                torch.set_grad_enabled(False)

        return enter

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        torch.set_grad_enabled(self._modes.pop())

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()

    def sensitivity(self, gradients: Callable[[], Sequence[Tensor | None]]) -> list[float]:
        """‖Δg‖² of each branch: how much the gradients of all parameters change if it alone is dropped.

        Args:
            gradients: a forward and backward of the same data each time, and the parameters' gradients.
        """
        kept, found = self.rates, []
        try:
            self.rates = [0.0] * len(kept)
            whole = [None if g is None else g.clone() for g in gradients()]
            for i in range(len(kept)):
                self.rates = [float(j == i) for j in range(len(kept))]
                pairs = zip(whole, gradients(), strict=True)
                found.append(sum(float(_difference(a, b)) for a, b in pairs))
        finally:
            self.rates = kept
        return found

    def allocate(self, sensitivity: Sequence[float], target: float = 0.5, cost: Sequence[float] | None = None) -> list[float]:
        """Sets rates whose mean, weighted by the branches' cost, is at least `target`: 0.1 at a time, where sensitivity · rate
        is least afterwards, up to 0.9. The authors do so once, after a tenth of the run.

        Raises:
            ValueError: target above 0.9, or not one sensitivity and one cost for each branch.
        """
        n, cost = len(self.branches), [1.0] * len(self.branches) if cost is None else list(cost)
        if not 0 <= target <= 0.9 or len(sensitivity) != n or len(cost) != n:
            raise ValueError(
                f"target must be in [0, 0.9], with {n} sensitivities and costs, got {target}, {len(sensitivity)}, {len(cost)}"
            )
        tenths = [0] * n
        while sum(c * t for c, t in zip(cost, tenths, strict=True)) < 10 * target * sum(cost) - 1e-9:
            free = [i for i in range(n) if tenths[i] < 9]
            tenths[min(free, key=lambda i: sensitivity[i] * (tenths[i] + 1))] += 1
        self.rates = [t / 10 for t in tenths]
        return self.rates


def _difference(a: Tensor | None, b: Tensor | None) -> Tensor | float:
    if a is None or b is None:
        one = b if a is None else a
        return 0.0 if one is None else one.square().sum()
    return (a - b).square().sum()
