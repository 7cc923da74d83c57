"""LoRAPrune's criterion, and the masks that it gives."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..quant import NF4Weight
from ..registry import method
from ..training import Path, TrainingMethod, low_rank_paths
from .allocation import CubicSchedule, top_k


@torch.no_grad()
def estimated_gradient(path: Path) -> Tensor:
    """Ĝ = B A - (B - g_B)(A - g_A) = g_B A + B g_A - g_B g_A, (N, K): the weight's gradient, from those of A and B."""
    A, B, g_A, g_B = path.lora_A, path.lora_B, path.lora_A.grad, path.lora_B.grad
    g_A, g_B = (torch.zeros_like(p) if g is None else g for p, g in ((A, g_A), (B, g_B)))
    return g_B @ (A - g_A) + B @ g_A


@method(
    "LoRAPrune",
    equation="score of a group of rows: mean over steps of Σ |Ĝ ∘ (W0 + s B A)|, Ĝ = g_B A + B g_A - g_B g_A; y ← mask ∘ y",
    use="method = methods.LoRAPrune(model, total_steps=1000)",
    changes="L",
    source="Zhang et al. 2023, https://arxiv.org/abs/2305.18403",
    test="test_sparse.py::test_loraprune_estimates_the_gradient",
    note="The criterion and its masks. Cutting heads and channels out of a model is the model's matter.",
)
class LoRAPrune(TrainingMethod):
    """Masks the output groups of each layer that matter least, by a gradient of the weight that is never computed.

    A masked output is 0, bias included: what the layer without those rows gives, where they are.

    Args:
        model: with LoRA, all of it trainable; forward hooks on its layers apply the masks. `remove()` takes them away.
        group_size: rows of W per group, as a head's, by the layer's name, or for all. N must be a multiple.
        total_steps: the share of masked groups rises as a cube from 0 at `first` · total_steps to `ratio` at the end.
        ratio, first, every, beta: see above; `beta` of the score's mean over steps.

    Raises:
        ValueError: no layer with LoRA, or a group size that does not divide a layer's outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        group_size: int | Mapping[str, int] = 1,
        ratio: float = 0.5,
        first: float = 0.1,
        every: int = 10,
        beta: float = 0.9,
    ) -> None:
        super().__init__()
        self.paths, self.beta = low_rank_paths(model), beta
        self.sizes = [group_size if isinstance(group_size, int) else group_size.get(path.name, 1) for path in self.paths]
        self.schedule = CubicSchedule(0.0, ratio, math.floor(first * total_steps), total_steps, every)
        for path, size in zip(self.paths, self.sizes, strict=True):
            if size < 1 or path.layer.out_features % size:
                raise ValueError(f"group_size must divide {path.layer.out_features} in {path.name}, got {size}")
        outputs = [path.layer.out_features for path in self.paths]
        self.scores = [torch.zeros(N // size, device=p.lora_A.device) for N, size, p in zip(outputs, self.sizes, self.paths)]  # noqa: B905
        self.masks = [torch.ones(N, dtype=torch.bool, device=p.lora_A.device) for N, p in zip(outputs, self.paths, strict=True)]
        self._handles = [
            path.layer.register_forward_hook(_masking(mask)) for path, mask in zip(self.paths, self.masks, strict=True)
        ]

    @torch.no_grad()
    def on_backward(self, step: int) -> None:
        for path, size, score in zip(self.paths, self.sizes, self.scores, strict=True):
            W = path.layer.weight.dequantize() if isinstance(path.layer.weight, NF4Weight) else path.layer.weight
            per_row = (estimated_gradient(path) * (W + path.scaling * (path.lora_B @ path.lora_A))).abs().sum(1)
            score.mul_(self.beta).add_(per_row.view(-1, size).sum(1), alpha=1 - self.beta)

    @torch.no_grad()
    def on_step(self, step: int) -> None:
        if self.schedule.due(step):
            for score, size, mask in zip(self.scores, self.sizes, self.masks, strict=True):
                (kept,) = top_k([score], len(score) - int(self.schedule(step) * len(score)))
                mask.copy_(kept.repeat_interleave(size))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _masking(mask: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda layer, inputs, y: y * mask
