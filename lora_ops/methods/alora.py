"""ALoRA: ranks move to where they matter."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..registry import method
from ..training import TrainingMethod, low_rank_paths
from .ranks import resize_rank


@method(
    "ALoRA",
    equation="score of rank k: S(M) - S(M without k) + S(M with k alone); the lowest go, others get as many",
    use="method = methods.ALoRA(model, score=lambda: -float(model(x).square().mean()), every=100)",
    changes="PL",
    source="Liu et al. 2024, https://arxiv.org/abs/2403.16187",
    test="test_ranks.py::test_alora_moves_ranks",
    note="A survey says that its gates are learned by architecture search; the paper replaces that search by ablation.",
)
class ALoRA(TrainingMethod):
    """Every so many steps, the `moved` ranks of the model with the least score are removed, and as many added, one by one in
    turn, to those paths that have lost the fewest. Every path keeps its best rank, so that the sum of ranks is constant.

    Args:
        model: gated paths, their gates 1. Needs `attach`.
        score: S, larger is better, of the model as it is, as minus the loss on a small batch. Called 2 Σ r + 1 times.
        every, first: steps: at first, first + every, ...
        moved: ranks per time.

    Raises:
        ValueError: no gated path.
    """

    def __init__(
        self, model: nn.Module, score: Callable[[], float], *, every: int, first: int | None = None, moved: int = 8
    ) -> None:
        super().__init__()
        self.paths, self.score, self.moved = low_rank_paths(model, gated=True), score, moved
        self.every, self.first = every, every if first is None else first

    @torch.no_grad()
    def importance(self) -> list[Tensor]:
        """Of every path's ranks, (r,) each, by ablation."""
        gates = [path.gate for path in self.paths if path.gate is not None]
        kept = [gate.clone() for gate in gates]
        whole, scores = self.score(), [torch.zeros(len(gate), dtype=torch.float64) for gate in gates]
        for gate, before, score in zip(gates, kept, scores, strict=True):
            for k in range(len(gate)):
                gate[k] = 0.0
                without = self.score()
                for other in gates:
                    other.zero_()
                gate[k] = before[k]
                score[k] = whole - without + self.score()
                for other, value in zip(gates, kept, strict=True):
                    other.copy_(value)
        return scores

    def on_step(self, step: int) -> None:
        if step < self.first or (step - self.first) % self.every:
            return
        scores = self.importance()
        for score in scores:
            score[score.argmax()] = math.inf
        movable = sum(len(score) for score in scores) - len(scores)
        flat = torch.cat(scores)
        lost = torch.zeros_like(flat, dtype=torch.bool)
        lost[flat.topk(min(self.moved, movable), largest=False).indices] = True
        parts = lost.split([len(score) for score in scores])
        losses = [int(part.sum()) for part in parts]
        takers = [i for i, n in enumerate(losses) if n == min(losses)]
        for i, (path, part) in enumerate(zip(self.paths, parts, strict=True)):
            new = sum(takers[j % len(takers)] == i for j in range(sum(losses)))
            resize_rank(path, ~part.to(path.lora_A.device), new, self._attached())
