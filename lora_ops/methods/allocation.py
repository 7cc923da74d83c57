"""A budget of ranks for the whole model, and who gets them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..training import Path, TrainingMethod
from .importance import Importance


class CubicSchedule:
    """From `start` at step `first` to `end` at step `last`, constant outside. With t from 0 to 1 between:

        end + (start - end) (1 - t)³       fast at first
        start + (end - start) t³           fast at last, with `late`

    Args:
        start, end: of either order, or equal.
        first, last: steps, first < last; last may be infinite.
        every: after `first`, the schedule is due at multiples of it, and at `last`.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, start: float, end: float, first: float, last: float, every: int = 1, *, late: bool = False) -> None:
        if not first < last:
            raise ValueError(f"first must be below last, got {first} and {last}")
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        self.start, self.end, self.first, self.last, self.every, self.late = start, end, first, last, every, late

    def __call__(self, step: int) -> float:
        t = min(max((step - self.first) / (self.last - self.first), 0.0), 1.0)
        if self.late:
            return self.start + (self.end - self.start) * t**3
        return (self.start - self.end) * (1 - t) ** 3 + self.end

    def due(self, step: int) -> bool:
        return step == self.last or (self.first < step < self.last and step % self.every == 0)


def top_k(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Which elements are among the k largest of all tensors together: exactly k, whatever is equal.

    Raises:
        ValueError: k is not between 0 and the number of elements.
    """
    flat = torch.cat([s.reshape(-1) for s in scores])
    if not 0 <= k <= flat.numel():
        raise ValueError(f"k must be between 0 and the {flat.numel()} elements, got {k}")
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep[flat.topk(k).indices] = True
    parts = keep.split([s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]


class Allocator(TrainingMethod):
    """After a step at which the schedule is due, the gates of all ranks but the `int(schedule(step))` most important ones of
    the whole model become zero. They train on, and may come back, until the last of these steps; from then on they stay zero.

    Args:
        paths: gated.
        importance: of each path's ranks, (r,) each; updated after every step before the schedule's last.
        schedule: of the budget, a number of ranks.
    """

    def __init__(self, paths: Sequence[Path], importance: Importance, schedule: CubicSchedule) -> None:
        super().__init__()
        self.paths, self.importance, self.schedule = paths, importance, schedule
        self.kept: list[Tensor] | None = None

    @torch.no_grad()
    def on_step(self, step: int) -> None:
        if step < self.schedule.last:
            self.importance.update()
        if self.schedule.due(step):
            self.kept = top_k(self.importance.value(), int(self.schedule(step)))
        elif step < self.schedule.last:
            return
        for path, kept in zip(self.paths, self.kept or (), strict=self.kept is not None):
            assert path.gate is not None
            path.gate.masked_fill_(~kept, 0.0)
