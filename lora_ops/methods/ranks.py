"""Ranks of a path that is there: removed, and added."""

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optim.state import substitute
from ..training import Path, low_rank_paths


@torch.no_grad()
def resize_rank(path: Path, keep: Tensor, new: int = 0, optimizer: Optimizer | None = None) -> None:
    """Keeps some ranks of a gated path and adds new ones, which change nothing at first: A's rows uniform in ±1/√K, B's columns
    zero, gates 1. The path has new parameters then, which take the old ones' places in the optimiser, with their moments.

    Args:
        path: gated, its A and B its own.
        keep: which ranks stay, (r,) of bool.
        new: how many are added.
        optimizer: which has the parameters. None: make one afterwards.

    Raises:
        ValueError: the path has no gate, or no rank would be left.
    """
    if path.gate is None:
        raise ValueError(f"path must have a gate, {path.name} has none")
    if int(keep.sum()) + new < 1:
        raise ValueError(f"keep and new must leave a rank, {path.name} would have none")
    K = path.lora_A.shape[1]
    rows = path.lora_A.new_empty(new, K).uniform_(-1 / math.sqrt(K), 1 / math.sqrt(K))
    columns, ones = path.lora_B.new_zeros(len(path.lora_B), new), path.gate.new_ones(new)
    kept = keep.nonzero().flatten()
    owned = ((path.pair, "lora_A", 0, rows), (path.pair, "lora_B", 1, columns), (path.layer.factors, "gate", 0, ones))
    for owner, name, dim, more in owned:
        p = getattr(owner, name)

        def resized(t: Tensor, more: Tensor, dim: int = dim) -> Tensor:
            return torch.cat([t.index_select(dim, kept), more.to(t.dtype)], dim)

        setattr(owner, name, nn.Parameter(resized(p, more), p.requires_grad))
        if optimizer is not None:
            state = substitute(optimizer, p, getattr(owner, name))
            for key, moment in state.items():
                if isinstance(moment, Tensor) and moment.shape == p.shape:
                    state[key] = resized(moment, torch.zeros_like(more))


def drop_zero_ranks(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, int]:
    """Removes the ranks whose gate is 0, which changes no output, and returns what is left of each path, by the layer's name. A
    path keeps one rank at least.

    Raises:
        ValueError: no gated path.
    """
    paths = low_rank_paths(model, gated=True)
    for path in paths:
        assert path.gate is not None
        keep = path.gate != 0
        keep[0] |= ~keep.any()
        resize_rank(path, keep, optimizer=optimizer)
    return {path.name: len(path.lora_A) for path in paths}
