"""Delta-LoRA: the frozen weight follows LoRA's product."""

import torch
from torch import Tensor, nn

from ..quant import NF4Weight
from ..registry import method
from ..training import TrainingMethod, low_rank_paths


@method(
    "Delta-LoRA",
    equation="W ← W + λ s (B' A' - B A) after every step from `start` on, A', B' the new factors",
    use="method = optim.DeltaLora(model, lam=2.0, start=500)",
    changes="O",
    source="Zi et al. 2023, https://arxiv.org/abs/2309.02411",
    test="test_optim.py::test_delta_lora_telescopes",
    note="With constant λ and s the sum telescopes, W - W0 = λ s (B A - B_start A_start): the whole update has rank <= 2 r, "
    "not the high rank that texts speak of.",
)
class DeltaLora(TrainingMethod):
    """From step `start` on, W changes by lam · scaling times the change of B A, as two rank-r updates in place.

    The first of these steps gives the layer a weight of its own, which the layer that it came from does not see. No dropout.

    Args:
        model: `FusedLoraLinear`s with a dense weight in float32 or float64: half precision would round most changes away.
        lam: λ.
        start: the first step that changes W, >= 1.

    Raises:
        ValueError: an argument out of its range, by name; no layer with LoRA.
        TypeError: a weight in another dtype or in 4 bits.
    """

    def __init__(self, model: nn.Module, lam: float = 2.0, start: int = 500) -> None:
        super().__init__()
        if start < 1:
            raise ValueError(f"start must be >= 1, got {start}")
        self.paths, self.lam, self.start = low_rank_paths(model), lam, start
        for path in self.paths:
            weight = path.layer.weight
            if path.gate is not None:
                raise ValueError(f"model must have paths without gates, got one in {path.name}")
            if isinstance(weight, NF4Weight) or weight.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"weights must be dense, in float32 or float64, got {weight.dtype} in {path.name}")
        self._before: list[tuple[Tensor, Tensor]] = []
        self._own: set[nn.Parameter] = set()

    def on_backward(self, step: int) -> None:
        if step >= self.start:
            self._before = [(path.lora_A.detach().clone(), path.lora_B.detach().clone()) for path in self.paths]

    @torch.no_grad()
    def on_step(self, step: int) -> None:
        if step < self.start:
            return
        for path, (A, B) in zip(self.paths, self._before, strict=True):
            layer, factor = path.layer, self.lam * path.scaling
            if layer.weight not in self._own:
                layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
                self._own.add(layer.weight)
            new_A, new_B = path.lora_A.to(layer.weight.dtype), path.lora_B.to(layer.weight.dtype)
            layer.weight.addmm_(new_B, new_A, alpha=factor).addmm_(B.to(new_B.dtype), A.to(new_A.dtype), alpha=-factor)
