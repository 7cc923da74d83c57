"""RegMean: the weights whose outputs are nearest to those of several models, each on its own inputs."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..nn.linear import FusedLoraLinear
from ..registry import method
from .averaging import Tensors, check_states, each_tensor


@method(
    "RegMean",
    equation="W = (Σ_k W_k G_k) (Σ_k G_k)⁻¹, G_k = X_kᵀ X_k with its off-diagonal times 0.9",
    use="model.load_state_dict(compose.regmean([tuned_1, tuned_2], [grams_1, grams_2]))",
    changes="CD",
    source="Jin et al. 2022, https://arxiv.org/abs/2212.09849",
    test="test_averaging.py::test_regmean_is_the_joint_least_squares_solution",
)
def regmean(tuned: Sequence[Tensors], grams: Sequence[Tensors], off_diagonal: float = 0.9) -> dict[str, Tensor]:
    """W = (Σ_k W_k G_k)(Σ_k G_k)⁻¹ of the weights (N, K) that have a Gram matrix, the mean of all other tensors.

    Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023
    (https://arxiv.org/abs/2212.09849). With `off_diagonal` 1 it minimises Σ_k ‖X_k Wᵀ - X_k W_kᵀ‖². Computed in fp64.

    Args:
        tuned: state dicts.
        grams: G_k = X_kᵀ X_k (K, K) of the inputs of layers, by the name of their weight (`input_grams`).
        off_diagonal: what multiplies all of G_k but its diagonal.

    Raises:
        ValueError: state dicts that differ, or not as many of each.
    """
    check_states(tuned, "tuned")
    if len(grams) != len(tuned):
        raise ValueError(f"grams must be one for each of {len(tuned)} models, got {len(grams)}")
    result = each_tensor(lambda *thetas: torch.stack(thetas).mean(0), tuned)
    for name in grams[0]:
        gs = [g[name].double() for g in grams]
        gs = [off_diagonal * g + (1 - off_diagonal) * g.diag().diag() for g in gs]
        weighted = sum(state[name].double() @ g for state, g in zip(tuned, gs, strict=True))
        solved = torch.linalg.solve(sum(gs), weighted, left=False)
        result[name] = solved.to(tuned[0][name].dtype)
    return result


@torch.no_grad()
def input_grams(
    model: nn.Module, batches: Iterable[object], forward: Callable[[nn.Module, object], object]
) -> dict[str, Tensor]:
    """xᵀ x of the inputs x of every linear layer, summed while `forward(model, batch)` runs, by the weight's name."""
    grams: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        grams[name] = rows.T @ rows + grams.get(name, 0)

    kinds = (nn.Linear, FusedLoraLinear)
    layers = {f"{name}.weight".removeprefix("."): m for name, m in model.named_modules() if isinstance(m, kinds)}
    handles = [m.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0])) for name, m in layers.items()]
    try:
        for batch in batches:
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return grams
