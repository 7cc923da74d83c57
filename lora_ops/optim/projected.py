"""Optimisers whose state is of low rank: full training with the gradient's projection in the user's torch optimiser."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import method
from ..training import TrainingMethod

Projector = Callable[[Tensor, int, int], Tensor]  # (G (a, b) with a <= b, rank, seed) -> P (a, rank)
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")  # as torch's optimisers call what is linear in the gradient


class ProjectedGradient(TrainingMethod):
    """For each matrix W (n, m) to train, the user's optimiser has a small one, W' (rank, max(n, m)), which is zero before
    every step and gets the gradient Pᵀ G (G transposed where n > m). What the step makes of W' is the update, projected back:
    W ← W + scale · P W'. So its moments have rank · max(n, m) elements.

    Any torch optimiser does; weight decay has nothing to act on. W may be any parameter that trains: the base weights
    themselves, without LoRA.

        method = galore(linear.parameters(), rank=64)
        optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
        method.attach(optimizer)

    Args:
        parameters: those that train and have two dimensions, both above `rank`, are projected; others go to the optimiser as
            they are.
        rank: of the projection, >= 1.
        every: P is made anew at steps 1, 1 + every, ...
        scale: of the projected update.
        projector: makes P.
        seeded: P depends on nothing but its seed. So it is not kept but made wherever it is needed, and the first moments move
            to each new one: M ← P'ᵀ P M.
        seed: of the first one.

    Raises:
        ValueError: an argument out of its range, by name.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        rank: int,
        *,
        every: int,
        scale: float,
        projector: Projector,
        seeded: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("rank", rank), ("every", every)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        trained = [p for p in parameters if p.requires_grad]
        if not trained:
            raise ValueError("parameters must have one that trains, got none")
        self.rank, self.every, self.scale = rank, every, scale
        self.projector, self.seeded, self.seed = projector, seeded, seed
        self.projected = {p: self._small(p) for p in trained if p.ndim == 2 and min(p.shape) > rank}
        self.others = [p for p in trained if p not in self.projected]
        self._projections: dict[nn.Parameter, Tensor] = {}

    def parameters(self) -> list[nn.Parameter]:
        """For the optimiser."""
        return [*self.projected.values(), *self.others]

    @torch.no_grad()
    def on_backward(self, step: int) -> None:
        if self.seeded:
            self._attached()
        for i, (p, small) in enumerate(self.projected.items()):
            if p.grad is None:
                small.grad = None
                continue
            G = _wide(p.grad, p)
            P = self._projection(p, G, i, step)
            if self.seeded and step > 1 and (step - 1) % self.every == 0:
                self._move(small, P.T @ self.projector(G, self.rank, self._seed(i, step - 1)))
            small.grad, p.grad = P.T @ G, None

    @torch.no_grad()
    def on_step(self, step: int) -> None:
        for i, (p, small) in enumerate(self.projected.items()):
            if small.grad is not None:
                P = self._projection(p, small.new_empty(min(p.shape), 0), i, step, fresh=False)
                p.add_(_wide(P @ small, p), alpha=self.scale)
                small.zero_()

    def _small(self, p: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(p.new_zeros(self.rank, max(p.shape)))

    def _projection(self, p: nn.Parameter, G: Tensor, i: int, step: int, *, fresh: bool = True) -> Tensor:
        if self.seeded:
            return self.projector(G, self.rank, self._seed(i, step))
        if p not in self._projections or (fresh and (step - 1) % self.every == 0):
            self._projections[p] = self.projector(G, self.rank, self._seed(i, step))
        return self._projections[p]

    def _seed(self, i: int, step: int) -> int:
        return self.seed + i + len(self.projected) * ((step - 1) // self.every)

    def _move(self, small: nn.Parameter, change: Tensor) -> None:
        state: dict[str, Any] = self._attached().state[small]
        for key in FIRST_MOMENTS:
            if isinstance(state.get(key), Tensor):
                state[key] = change @ state[key]


def _wide(G: Tensor, p: nn.Parameter) -> Tensor:
    """With the shorter side first, or back again."""
    return G if p.shape[0] <= p.shape[1] else G.T


def _principal(G: Tensor, rank: int, seed: int) -> Tensor:
    wide = G.to(torch.promote_types(G.dtype, torch.float32))
    return torch.linalg.svd(wide, full_matrices=False).U[:, :rank].to(G.dtype)


def _random(G: Tensor, rank: int, seed: int) -> Tensor:
    P = torch.randn(G.shape[0], rank, generator=torch.Generator().manual_seed(seed)) / math.sqrt(rank)
    return P.to(G)


@method(
    "GaLore",
    equation="W ← W + scale · P step(Pᵀ G), P = first r left singular vectors of G",
    use="method = optim.galore([p for p in model.parameters() if p.requires_grad], rank=4)",
    changes="O",
    source="Zhao et al. 2024, https://arxiv.org/abs/2403.03507",
    test="test_optim.py::test_galore_takes_the_best_low_rank_step",
)
def galore(parameters: Iterable[nn.Parameter], rank: int = 128, *, every: int = 200, scale: float = 0.25) -> ProjectedGradient:
    """`ProjectedGradient` onto the gradient's principal directions, found anew every 200 steps. As its authors do, the moments
    stay what they are then."""
    return ProjectedGradient(parameters, rank, every=every, scale=scale, projector=_principal)


@method(
    "FLoRA (gradient compressor)",
    equation="M ← β M + (1 - β) Pᵀ G, W ← W - η P M, P normal with variance 1/r, from a seed",
    use="method = optim.flora([p for p in model.parameters() if p.requires_grad], rank=4)",
    changes="O",
    source="Hao et al. 2024, https://arxiv.org/abs/2402.03293",
    test="test_optim.py::test_flora_projects_without_bias",
    note="Two more systems are called FLoRA: one with a Tucker core, and one that runs many adapters in a batch.",
)
def flora(parameters: Iterable[nn.Parameter], rank: int = 128, *, every: int = 1000, seed: int = 0) -> ProjectedGradient:
    """`ProjectedGradient` onto random directions, E[P Pᵀ] = I, redrawn every 1000 steps; only their seed is kept, and first
    moments move to the new ones. Second moments, which are not linear, stay; the authors have Adafactor's, of the projected
    gradient decompressed."""
    return ProjectedGradient(parameters, rank, every=every, scale=1.0, projector=_random, seeded=True, seed=seed)
