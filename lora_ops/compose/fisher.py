"""Fisher merging: every weight counts as much as its model's data depends on it."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..registry import method
from .averaging import Tensors, check_states, wide


@method(
    "Fisher merging",
    equation="θ = Σ_k λ_k F_k ∘ θ_k / Σ_k λ_k F_k, F the mean square of the gradient of log p",
    use="model.load_state_dict(compose.fisher_merge([tuned_1, tuned_2], [fisher_1, fisher_2]))",
    changes="CD",
    source="Matena and Raffel 2021, https://arxiv.org/abs/2111.09832",
    test="test_averaging.py::test_fisher_merge",
)
def fisher_merge(
    tuned: Sequence[Tensors], fishers: Sequence[Tensors], coefficients: Sequence[float] | None = None, floor: float = 1e-6
) -> dict[str, Tensor]:
    """Σ_k λ_k F_k θ_k / Σ_k λ_k F_k, element by element, no F_k below `floor`; the mean, weighted by λ, where there is no F_k.

    Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022 (https://arxiv.org/abs/2111.09832).

    Args:
        tuned: state dicts θ_k.
        fishers: F_k by the same names, non-negative (`fisher_diagonal`).
        coefficients: λ_k, positive. None: 1 each.

    Raises:
        ValueError: state dicts that differ, or not as many of each.
    """
    check_states(tuned, "tuned")
    weights = [1.0] * len(tuned) if coefficients is None else list(coefficients)
    if not len(tuned) == len(fishers) == len(weights):
        raise ValueError(
            f"fishers and coefficients must be one for each of {len(tuned)} models, got {len(fishers)}, {len(weights)}"
        )
    result = {}
    for name, first in tuned[0].items():
        thetas = [wide(state[name]) for state in tuned]
        if not first.is_floating_point():
            result[name] = first.clone()
            continue
        factors = [w * (f[name].to(t.dtype).clamp_min(floor) if name in f else torch.ones_like(t))
                   for w, f, t in zip(weights, fishers, thetas, strict=True)]  # fmt: skip
        total = sum(f * t for f, t in zip(factors, thetas, strict=True)) / sum(factors)
        result[name] = total.to(first.dtype)  # type: ignore[union-attr]
    return result


def fisher_diagonal(
    model: nn.Module, examples: Iterable[object], log_likelihood: Callable[[nn.Module, object], Tensor]
) -> dict[str, Tensor]:
    """The mean over examples of (∂ log p / ∂θ)², (shape of each parameter that requires grad), in fp32 at least.

    Args:
        examples: one at a time: the square of a batch's summed gradient is another number.
        log_likelihood: `log_likelihood(model, example)` returns log p of a label, the example's (empirical Fisher) or one
            sampled from the model.

    Raises:
        ValueError: no examples.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(wide(p)) for name, p in parameters.items()}
    n = 0
    for example in examples:
        grads = torch.autograd.grad(log_likelihood(model, example), list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                total[name] += wide(grad).square()
        n += 1
    if n == 0:
        raise ValueError("examples must hold at least one example, got none")
    return {name: t / n for name, t in total.items()}
