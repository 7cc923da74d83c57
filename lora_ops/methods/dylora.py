"""DyLoRA: every rank at once."""

import torch
from torch import nn

from ..registry import method
from ..training import TrainingMethod, low_rank_paths


@method(
    "DyLoRA",
    equation="ΔW = s (r / b) B[:, :b] A[:b], b uniform in 1...r anew at every step",
    use="method = methods.DyLoRA(model)",
    changes="PL",
    source="Valipour et al. 2022, https://arxiv.org/abs/2210.07558",
    test="test_ranks.py::test_dylora_truncates",
    note="The official code multiplies both factors by √(r / b), which is a gate of r / b on the first b ranks.",
)
class DyLoRA(TrainingMethod):
    """Trains all ranks b = 1...r at once: each step runs the first b of each path, by a gate that does not train.

    Args:
        model: gated paths; their gates are the method's from now on.
        frozen: only row and column b get a gradient, as the authors' "frozen" mode has it. An optimiser with momentum moves the
            others all the same.
        generator: of b. None: torch's default.

    Raises:
        ValueError: no gated path.
    """

    def __init__(self, model: nn.Module, *, frozen: bool = False, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.paths, self.frozen, self.generator = low_rank_paths(model, gated=True), frozen, generator
        self.rank = self.max_rank = max(len(path.lora_A) for path in self.paths)
        for path in self.paths:
            assert path.gate is not None
            path.gate.requires_grad_(False)
        self.sample()

    def sample(self) -> int:
        """Draws b and sets it."""
        self.set_rank(int(torch.randint(1, self.max_rank + 1, (), generator=self.generator)))
        return self.rank

    @torch.no_grad()
    def set_rank(self, b: int) -> None:
        """Runs the first b ranks from now on, for inference too.

        Raises:
            ValueError: b is not between 1 and the largest rank.
        """
        if not 1 <= b <= self.max_rank:
            raise ValueError(f"b must be between 1 and {self.max_rank}, got {b}")
        self.rank = b
        for path in self.paths:
            assert path.gate is not None
            r = len(path.gate)
            path.gate.zero_()
            path.gate[:b] = r / min(b, r)

    def on_backward(self, step: int) -> None:
        if not self.frozen:
            return
        for path in self.paths:
            for grad in (path.lora_A.grad, None if path.lora_B.grad is None else path.lora_B.grad.T):
                if grad is not None:
                    others = torch.arange(len(grad), device=grad.device) != min(self.rank, len(grad)) - 1
                    grad[others] = 0.0

    def on_step(self, step: int) -> None:
        self.sample()
