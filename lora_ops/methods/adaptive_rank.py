"""Ranks that training gives and takes, by gates: AdaLoRA, dynamic DoRA, SoRA."""

from torch import Tensor, nn

from ..optim.proximal import prox_l1_
from ..registry import method
from ..training import TrainingMethod, low_rank_paths
from .allocation import Allocator, CubicSchedule
from .importance import Importance, component_norms, sensitivity
from .regularizers import Regularizer, factor_variance, mean_magnitude, orthogonality


@method(
    "AdaLoRA",
    equation="y = x W0ᵀ + s ((x Aᵀ) ∘ E) Bᵀ, E of all but the b(step) most important triplets zero; + λ ‖A Aᵀ - I‖, ‖Bᵀ B - I‖",
    use="method = methods.adalora(model, target_r=4, total_steps=1000, initial=100, final=200)",
    changes="PL",
    source="Zhang et al. 2023, https://arxiv.org/abs/2303.10512",
    test="test_adaptive_rank.py::test_adalora_is_pefts",
    note="Official code and PEFT scale by alpha / (r + 1e-5), r the initial rank, which PEFT 0.21 lets the optimiser train. "
    "The regulariser weighs 0.1 in the official code, 0.5 in PEFT, whose PeftModel leaves it out where it has no task type. "
    "PEFT masks too many triplets where scores tie, and fails where target_r is the initial rank.",
)
def adalora(
    model: nn.Module,
    target_r: int,
    total_steps: int,
    *,
    initial: int = 0,
    final: int = 0,
    every: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orthogonality_weight: float = 0.5,
) -> TrainingMethod:
    """Prunes the triplets (row of A, gate, column of B) of the whole model to target_r per path.

    The score of a triplet is that of its gate plus the mean of its row and of its column, each Ī Ū of |p · ∂L/∂p|
    (`Importance`), measured after the step. The budget falls as a cube between steps `initial` and total_steps - final.

    Args:
        model: gated paths; the gates are zero at first, A and B normal with standard deviation 0.02.
        target_r: ranks per path in the end, on average.
        total_steps, initial, final, every: PEFT's total_step, tinit, tfinal and deltaT.
        orthogonality_weight: of the regulariser.

    Raises:
        ValueError: no gated path, or an argument out of its range.
    """
    paths = low_rank_paths(model, gated=True)
    budget = sum(len(path.lora_A) for path in paths)
    if not 0 < target_r * len(paths) <= budget:
        raise ValueError(f"target_r must be positive and at most {budget / len(paths):g}, the mean rank, got {target_r}")

    def score() -> list[Tensor]:
        return [s for path in paths for s in sensitivity([path.gate, path.lora_A, path.lora_B])]  # type: ignore[list-item]

    def triplets(values: list[Tensor]) -> list[Tensor]:
        return [values[i] + values[i + 1].mean(1) + values[i + 2].mean(0) for i in range(0, len(values), 3)]

    schedule = CubicSchedule(budget, target_r * len(paths), initial, total_steps - final, every)
    return TrainingMethod(
        Regularizer(orthogonality_weight, lambda: orthogonality(paths)),
        Allocator(paths, Importance(score, beta1, beta2, triplets), schedule),
    )


@method(
    "DoRA (dynamic low-rank)",
    equation="ΔW = s Σ c_k b_k a_kᵀ, c = 0 at first; ranks with small ‖c_k b_k a_kᵀ‖ / ‖ΔW‖ pruned",
    use="method = methods.dynamic_dora(model, target_r=4, total_steps=1000)",
    changes="PL",
    source="Mao et al. 2024, https://arxiv.org/abs/2405.17357",
    test="test_adaptive_rank.py::test_dynamic_dora_scores_components",
    note="Not the weight-decomposed DoRA. The official code prunes as t³ (little at first), AdaLoRA's as 1 - (1 - t)³, and "
    "forms every component, (r, N, K), for its norm.",
)
def dynamic_dora(
    model: nn.Module,
    target_r: int,
    total_steps: int,
    *,
    first: float = 0.15,
    last: float = 0.5,
    every: int = 100,
    beta: float = 0.9,
    variance_weight: float = 0.1,
) -> TrainingMethod:
    """Prunes single-rank components of the whole model to target_r per path, by their share of ΔW (`component_norms`).

    Args:
        model: gated paths, of 1.5 target_r at first, their gates zero, A and B as `nn.Linear` initialises.
        target_r: ranks per path in the end, on average.
        total_steps, first, last: pruning goes from step first · total_steps to last · total_steps.
        every: steps between prunings.
        beta: of the score's mean over steps.
        variance_weight: of the mean variance of A's rows and B's columns, until pruning ends.

    Raises:
        ValueError: no gated path, or an argument out of its range.
    """
    paths = low_rank_paths(model, gated=True)
    budget, begin, end = sum(len(path.lora_A) for path in paths), int(first * total_steps), int(last * total_steps)
    schedule = CubicSchedule(budget, target_r * len(paths), begin, end, every, late=True)
    return TrainingMethod(
        Regularizer(variance_weight, lambda: factor_variance(paths), until=end),
        Allocator(paths, Importance(lambda: component_norms(paths), beta), schedule),
    )


@method(
    "SoRA",
    equation="g ← sign(g) max(|g| - ξ, 0) after every step; + λ mean |g|",
    use="method = methods.SoRA(model)",
    changes="PL",
    source="Ding et al. 2023, https://arxiv.org/abs/2311.11696",
    test="test_adaptive_rank.py::test_sora_takes_the_proximal_step",
    note="The official threshold is three statements in place, the last of which sees what the others have left: gates with "
    "ξ < |g| < 2 ξ become zero, too. Its ξ is not multiplied by the learning rate, the paper's is.",
)
class SoRA(TrainingMethod):
    """Gates that an L1 penalty makes zero, one by one; `drop_zero_ranks` then removes their ranks without loss.

    Args:
        model: gated paths, their gates normal at first.
        sparse_lambda: weight of the mean of |g|, added to the gradients.
        threshold: ξ of the proximal step, or its product with the learning rate where `times_lr`.
        times_lr: as in the paper; needs `attach`.

    Raises:
        ValueError: no gated path.
    """

    def __init__(
        self, model: nn.Module, *, sparse_lambda: float = 1e-3, threshold: float = 1e-3, times_lr: bool = False
    ) -> None:
        self.paths, self.threshold, self.times_lr = low_rank_paths(model, gated=True), threshold, times_lr
        super().__init__(Regularizer(sparse_lambda, lambda: mean_magnitude(self._gates())))

    def on_step(self, step: int) -> None:
        groups = self._attached().param_groups if self.times_lr else []
        rates = {p: group["lr"] for group in groups for p in group["params"]}
        for gate in self._gates():
            prox_l1_(gate, self.threshold * (rates[gate] if self.times_lr else 1))

    def _gates(self) -> list[Tensor]:
        return [path.gate for path in self.paths if path.gate is not None]
