"""Elements of A and B that are zero: SparseAdapter, RoseLoRA, PRILoRA."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..registry import method
from ..training import low_rank_paths
from .allocation import CubicSchedule
from .importance import Importance, sensitivity
from .pruning import Pruner


def _factors(model: nn.Module) -> list[nn.Parameter]:
    return [p for path in low_rank_paths(model) for p in (path.lora_A, path.lora_B)]


@method(
    "SparseAdapter",
    equation="A, B ← mask ∘ A, B; the mask keeps the elements of largest random | |p| | |p ∂L/∂p| | p H g score, once",
    use="method = methods.sparse_adapter(model, sparsity=0.5, at=10)",
    changes="L",
    source="He et al. 2022, https://arxiv.org/abs/2210.04284",
    test="test_sparse.py::test_sparse_adapter_stays_sparse",
    note="At LoRA's initialisation B is zero, and A's gradient: |p| takes all of B first, and |p ∂L/∂p| is 0 everywhere. So "
    "pruning at once, as the authors do, is for adapters that begin otherwise; here it waits some steps.",
)
def sparse_adapter(
    model: nn.Module,
    sparsity: float = 0.5,
    score: str | Callable[[Sequence[nn.Parameter]], list[Tensor]] = "snip",
    *,
    at: int = 10,
) -> Pruner:
    """Once, at step `at`, the least elements of all A and B together become zero, and stay so.

    Args:
        model: with LoRA.
        sparsity: in [0, 1).
        score: "rand", "mag" (|p|), "snip" (|p · ∂L/∂p|), or a function of the parameters (`hessian_gradient`).
        at: the step.

    Raises:
        ValueError: no layer with LoRA, or an argument out of its range.
    """
    scores: dict[str, Callable[[Sequence[nn.Parameter]], list[Tensor]]] = {
        "rand": lambda ps: [torch.rand_like(p) for p in ps],
        "mag": lambda ps: [p.detach().abs() for p in ps],
        "snip": sensitivity,
    }
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    if not callable(score) and score not in scores:
        raise ValueError(f"score must be a function or one of {', '.join(scores)}, got {score!r}")
    parameters, by = _factors(model), score if callable(score) else scores[score]
    last_only = Importance(lambda: by(parameters), 0.0)
    return Pruner(parameters, None, last_only, CubicSchedule(0.0, sparsity, at - 1, at), fixed=True)


@method(
    "RoseLoRA",
    equation="in every row of A and column of B, the sparsity(step) share with the least mean of |p ∂L/∂p| becomes 0",
    use="method = methods.roselora(model, sparsity=0.9, total_steps=1000)",
    changes="L",
    source="Wang et al. 2024, https://arxiv.org/abs/2406.10777",
    test="test_sparse.py::test_roselora_prunes_every_rank",
)
def roselora(model: nn.Module, sparsity: float, total_steps: int, *, beta: float = 0.8) -> Pruner:
    """Sparse rank vectors, so that ΔW is sparse: nnz(ΔW) <= Σ_k nnz(a_k) nnz(b_k). The sparsity rises as a cube from 0 at
    0.1 total_steps to `sparsity` at 0.8 total_steps.

    Raises:
        ValueError: no layer with LoRA, or an argument out of its range.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    parameters = _factors(model)
    schedule = CubicSchedule(0.0, sparsity, int(0.1 * total_steps), int(0.8 * total_steps))
    importance = Importance(lambda: sensitivity(parameters), beta)
    return Pruner(parameters, [1, 0] * (len(parameters) // 2), importance, schedule)


def prilora_ranks(names: Sequence[str], first: int = 4, last: int = 12) -> dict[str, int]:
    """Ranks that rise linearly with depth, as a `rank_pattern`: their sum is that of the line, (first + last) / 2 · n rounded.

    Args:
        names: of layers, the lowest first.
        first, last: ranks of the lowest and the highest, 1 <= first <= last.

    Raises:
        ValueError: an argument out of its range.
    """
    n = len(names)
    if not 1 <= first <= last or n == 0:
        raise ValueError(f"first and last must be 1 <= first <= last, of one name at least, got {first}, {last} and {n} names")
    sums = [i * first + (last - first) * i * (i - 1) / (2 * max(n - 1, 1)) for i in range(n + 1)]
    return dict(zip(names, sorted(round(b) - round(a) for a, b in itertools.pairwise(sums)), strict=True))


@method(
    "PRILoRA",
    equation="ranks rise linearly with depth; every 40 steps, half of each row of A with least |A_ij| mean(‖x_j‖) becomes 0",
    use="method = methods.PRILoRA(model)",
    changes="L",
    source="Benedek and Wolf 2024, https://arxiv.org/abs/2401.11316",
    test="test_sparse.py::test_prilora_prunes_rows_of_A",
)
class PRILoRA(Pruner):
    """Prunes A by magnitude times the mean norm of its inputs; what was pruned trains on. Ranks: `prilora_ranks`.

    Args:
        model: with LoRA; forward hooks on its layers see the inputs of training. `remove()` takes them away.
        sparsity, every: half of each row, every 40 steps.
        beta: of the mean over forward passes.

    Raises:
        ValueError: no layer with LoRA.
    """

    def __init__(self, model: nn.Module, *, sparsity: float = 0.5, every: int = 40, beta: float = 0.9) -> None:
        self.paths = low_rank_paths(model)
        self.norms = [torch.zeros(path.lora_A.shape[1], device=path.lora_A.device) for path in self.paths]
        self.beta = beta
        parameters = [path.lora_A for path in self.paths]
        schedule = CubicSchedule(sparsity, sparsity, 0, math.inf, every)
        super().__init__(parameters, [1] * len(parameters), Importance(self._score, 0.0), schedule)
        self._handles = [
            path.layer.register_forward_pre_hook(self._observer(norm))
            for path, norm in zip(self.paths, self.norms, strict=True)
        ]

    def _score(self) -> list[Tensor]:
        return [path.lora_A.detach().abs() * norm for path, norm in zip(self.paths, self.norms, strict=True)]

    def _observer(self, norm: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if layer.training and torch.is_grad_enabled():
                x = inputs[0].detach().reshape(-1, len(norm)).float()
                norm.mul_(self.beta).add_(torch.linalg.vector_norm(x, dim=0), alpha=1 - self.beta)

        return observe

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
