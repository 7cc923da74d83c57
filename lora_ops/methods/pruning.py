"""Which elements of parameters are zero, and by what score."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..training import TrainingMethod
from .allocation import CubicSchedule, top_k
from .importance import Importance


class Pruner(TrainingMethod):
    """After a step at which the schedule is due, the `int(sparsity · n)` elements of least importance become zero, of n in each
    vector along a parameter's dimension, or in all parameters together.

    Args:
        parameters: what is pruned.
        dims: the dimension along which each parameter's vectors lie, or None: all parameters together.
        importance: of the parameters' elements, in their shapes; updated before every step.
        schedule: of the sparsity, in [0, 1]. After its last step it goes on at every step.
        fixed: after the last step the mask stays what it is, and acts on gradients, too: nothing comes back, whatever the
            optimiser's momentum.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        dims: Sequence[int] | None,
        importance: Importance,
        schedule: CubicSchedule,
        *,
        fixed: bool = False,
    ) -> None:
        super().__init__()
        self.pruned, self.dims, self.importance, self.schedule, self.fixed = list(parameters), dims, importance, schedule, fixed
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def on_backward(self, step: int) -> None:
        if not (self.fixed and step > self.schedule.last):
            self.importance.update()
        elif self.kept:
            for p, kept in zip(self.pruned, self.kept, strict=True):
                if p.grad is not None:
                    p.grad.mul_(kept)

    @torch.no_grad()
    def on_step(self, step: int) -> None:
        over = step > self.schedule.last
        if self.schedule.due(step) or (over and not self.fixed):
            self.kept = self._masks(self.schedule(step))
        elif not over:
            return
        for p, kept in zip(self.pruned, self.kept, strict=bool(self.kept)):
            p.mul_(kept)

    def _masks(self, sparsity: float) -> list[Tensor]:
        values = self.importance.value()
        if all(not v.any() for v in values):
            raise RuntimeError("importance is zero everywhere, as where B is zero: prune some steps later")
        if self.dims is None:
            n = sum(v.numel() for v in values)
            return top_k(values, n - int(sparsity * n))
        masks = []
        for v, dim in zip(values, self.dims, strict=True):
            least = v.topk(int(sparsity * v.shape[dim]), dim, largest=False).indices
            masks.append(torch.ones_like(v, dtype=torch.bool).scatter_(dim, least, False))
        return masks


@torch.enable_grad()
def hessian_gradient(parameters: Sequence[Tensor], loss: Callable[[], Tensor], eps: float = 1e-3) -> list[Tensor]:
    """p ∘ H g, g = ∇L, as GraSP scores (Wang et al. 2020, https://arxiv.org/abs/2002.07376): without what is large, the norm of
    the gradient falls. H g is (∇L(p + h g) - ∇L(p - h g)) / 2 h with h = eps / ‖g‖."""
    kept = [p.detach().clone() for p in parameters]
    g = torch.autograd.grad(loss(), parameters)
    h = eps / torch.stack([t.square().sum() for t in g]).sum().sqrt().clamp(min=1e-30).item()
    sides = []
    for sign in (h, -h):
        with torch.no_grad():
            for p, value, direction in zip(parameters, kept, g, strict=True):
                p.copy_(value + sign * direction)
        sides.append(torch.autograd.grad(loss(), parameters))
    with torch.no_grad():
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
    return [p.detach() * (a - b) / (2 * h) for p, a, b in zip(parameters, *sides, strict=True)]


def synaptic_flow(model: nn.Module, x: Tensor) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """A score of parameters, |p · ∂R/∂p| with R the sum of the model's outputs for ones of x's shape, every parameter replaced
    by its magnitude (Tanaka et al. 2020, https://arxiv.org/abs/2006.05467)."""

    @torch.enable_grad()
    def score(parameters: Sequence[Tensor]) -> list[Tensor]:
        named = {name: p.detach().abs().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
        total = torch.func.functional_call(model, named, (torch.ones_like(x),)).sum()
        places = {p: named[name] for name, p in model.named_parameters()}
        scored = [places[p] for p in parameters]  # type: ignore[index]
        grads = torch.autograd.grad(total, scored, allow_unused=True)
        return [torch.zeros_like(p) if g is None else (p * g).detach() for p, g in zip(scored, grads, strict=True)]

    return score
