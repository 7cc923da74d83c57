"""What is kept of a layer's inputs or gradients: a few numbers, whatever the batches."""

import torch
from torch import Tensor

from .corda import input_covariance


class Covariance:
    """The mean of `input_covariance` over calls."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    def update(self, X: Tensor) -> None:
        self.total = self.total + input_covariance(X)
        self.count += 1


class MeanMagnitude:
    """mean |x|, (K,), over all rows."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    def update(self, X: Tensor) -> None:
        self.total = self.total + X.abs().sum(0)
        self.count += len(X)


class MeanGradient:
    """The sum of gradients; between batches it is kept in the weight's dtype, in as much memory as the weight takes."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.total: Tensor | None = None
        self.kept: Tensor | None = None  # one place for all batches: new ones in between would leave the heap in pieces

    def update(self, G: Tensor) -> None:
        self.total = G if self.total is None else G.add_(self.total)

    def rest(self) -> None:
        assert self.total is not None
        if self.kept is None:
            self.kept = torch.empty_like(self.total, dtype=self.dtype)
        self.total = self.kept.copy_(self.total)


class Fisher:
    """Means of squared gradients over a weight's columns, (N,), and over its rows, (K,)."""

    def __init__(self) -> None:
        self.rows: Tensor | float = 0.0
        self.columns: Tensor | float = 0.0

    def update(self, G: Tensor) -> None:
        squared = G.square()
        self.rows, self.columns = self.rows + squared.mean(1), self.columns + squared.mean(0)
