"""What an optimiser knows of its parameters: forgotten, or handed on."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@torch.no_grad()
def reset_moments(optimizer: Optimizer, parameters: Iterable[nn.Parameter], share: float = 1.0, by: str = "random") -> None:
    """Forgets an optimiser's state of these parameters: all of it, or a share of the elements, at "random" or those whose first
    moment is smallest in "magnitude". The other elements keep all their moments, and the count of steps.

    Raises:
        ValueError: an argument out of its range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    if by not in ("random", "magnitude"):
        raise ValueError(f'by must be "random" or "magnitude", got {by!r}')
    for p in parameters:
        if share == 1:
            optimizer.state.pop(p, None)
        state = optimizer.state[p].values() if p in optimizer.state else ()
        moments = [t for t in state if isinstance(t, Tensor) and t.shape == p.shape]
        if moments:  # one choice for all: a first moment without its second would be a step without bound
            size = torch.rand_like(moments[0]) if by == "random" else moments[0].abs()
            forgotten = size.view(-1).topk(int(share * p.numel()), largest=False).indices
            for moment in moments:
                moment.view(-1)[forgotten] = 0.0


def substitute(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter) -> dict[str, Any]:
    """Has the optimiser step `new` in the place of `old`, with its state, which is returned. Writing another shape into `old`
    itself would not do: graphs that are alive remember the one it had."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, {})
    if state:
        optimizer.state[new] = state
    return state
