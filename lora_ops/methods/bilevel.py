"""Two levels: outer parameters learn on validation data, through a step of the inner ones on training data."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..training import TrainingMethod

Loss = Callable[[], Tensor]


def hypergradient(
    outer: Sequence[Tensor],
    inner: Sequence[Tensor],
    train_loss: Loss,
    validation_loss: Loss,
    unroll_lr: float,
    eps: float = 0.01,
) -> tuple[Tensor, ...]:
    """d/d outer of L_val(inner - ξ ∇_inner L_train(inner, outer), outer), ξ = unroll_lr, without second derivatives:

        ∇_outer L_val(w') - ξ (∇_outer L_train(w + ε v) - ∇_outer L_train(w - ε v)) / 2 ε

    with w' the inner parameters after the step, v = ∇_w' L_val and ε = eps / ‖v‖ (Liu et al. 2018, DARTS,
    https://arxiv.org/abs/1806.09055). ξ = 0 is plain ∇_outer L_val. The inner parameters are put back, bit for bit.
    """

    def gradients(loss: Loss, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(), of)

    if unroll_lr == 0:
        return gradients(validation_loss, outer)
    with _moved(inner, gradients(train_loss, inner), -unroll_lr):
        found = gradients(validation_loss, [*outer, *inner])
    direct, v = found[: len(outer)], found[len(outer) :]
    norm = torch.stack([g.square().sum() for g in v]).sum().sqrt().item()
    if norm == 0:
        return direct
    h = eps / norm
    with _moved(inner, v, h):
        plus = gradients(train_loss, outer)
    with _moved(inner, v, -h):
        minus = gradients(train_loss, outer)
    return tuple(d - unroll_lr * (p - m) / (2 * h) for d, p, m in zip(direct, plus, minus, strict=True))


@contextmanager
def _moved(parameters: Sequence[Tensor], directions: Sequence[Tensor], by: float) -> Iterator[None]:
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, d in zip(parameters, directions, strict=True):
            p.add_(d, alpha=by)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)


class Bilevel(TrainingMethod):
    """Before every step, replaces the outer parameters' gradients by the `hypergradient`; the inner ones keep theirs."""

    def __init__(
        self, outer: Sequence[Tensor], inner: Sequence[Tensor], train_loss: Loss, validation_loss: Loss, unroll_lr: float
    ) -> None:
        super().__init__()
        self.outer, self.inner, self.unroll_lr = list(outer), list(inner), unroll_lr
        self.train_loss, self.validation_loss = train_loss, validation_loss

    def on_backward(self, step: int) -> None:
        grads = hypergradient(self.outer, self.inner, self.train_loss, self.validation_loss, self.unroll_lr)
        for p, grad in zip(self.outer, grads, strict=True):
            p.grad = grad
