"""EVA: A spans what varies most in a layer's inputs, and ranks go where it varies most."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..registry import method
from .base import Initial, initialisation


class IncrementalPCA:
    """The leading principal components of rows that come in batches, without keeping them.

    After X_1, ..., X_n: `components` (r, K), orthonormal, `singular_values` (r,) of the centred rows, and
    `explained_variance_ratio` (r,). Exact as long as r components hold all that was seen (Ross et al. 2008, "Incremental
    Learning for Robust Visual Tracking").

    Args:
        r: how many components.
    """

    def __init__(self, r: int) -> None:
        self.r = r
        self.count = 0
        self.components: Tensor | None = None
        self.singular_values: Tensor
        self.mean: Tensor  # (K,) of all rows
        self.squares: Tensor  # Σ of the centred rows' squares
        self.change: Tensor | None = None  # (r,) cosines of the components of before and after the last batch

    def update(self, X: Tensor) -> None:
        """Takes rows X (M, K), in float32 or float64. Those of a first batch of fewer than r are no start, and are left out."""
        M = len(X)
        if M == 0 or (self.components is None and self.r > M):
            return
        mean, centred = X.mean(0), X - X.mean(0)
        squares = centred.square().sum(dtype=torch.float64)
        before = self.components
        if before is None:
            self.mean, self.squares, rows = mean, squares, centred
        else:
            shift = (self.mean - mean) * (self.count * M / (self.count + M)) ** 0.5
            rows = torch.cat([self.singular_values[:, None] * before, centred, shift[None]])
            self.mean = self.mean + (mean - self.mean) * (M / (self.count + M))
            self.squares = self.squares + squares + shift.square().sum(dtype=torch.float64)
        self.count += M
        _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
        self.components, self.singular_values = Vh[: self.r], S[: self.r]
        if before is not None:
            self.change = torch.nn.functional.cosine_similarity(self.components, before).abs()

    @property
    def explained_variance_ratio(self) -> Tensor:
        return (self.singular_values.double().square() / self.squares).to(self.singular_values.dtype)


@method(
    "EVA",
    equation="A = the r principal directions of the inputs, B = 0; ranks by explained variance, their sum fixed",
    use='init.initialize(model, "eva", batches, rho=2.0)',
    changes="ID",
    source="Paischer et al. 2024, https://arxiv.org/abs/2410.07170",
    test="test_init_data.py::test_eva_s_subspaces_and_ranks_are_peft_s",
    note="PEFT computes the components by an iteration from a fixed random start; here they are exact.",
)
@initialisation("eva", calibrated=True)
def eva(
    weight: Tensor, r: int, scaling: float, *, X: Tensor | None = None, pca: IncrementalPCA | None = None, whiten: bool = False
) -> Initial:
    """A (r, K) = the leading principal directions of the inputs, B = 0 (Paischer et al. 2024,
    https://arxiv.org/abs/2410.07170).

    Args:
        X: (M, K) inputs, M >= r.
        pca: of the inputs, instead of X.
        whiten: divide each direction by the square root of its singular value.

    Raises:
        ValueError: fewer than r directions.
    """
    if (X is None) == (pca is None):
        raise ValueError("X must be given for 'eva', or pca")
    if pca is None:
        assert X is not None
        pca = IncrementalPCA(r)
        pca.update(X)
    if pca.components is None or len(pca.components) < r:
        found = 0 if pca.components is None else len(pca.components)
        raise ValueError(f"r must be at most the number of directions that the inputs have, {found}, got {r}")
    A = pca.components[:r].to(weight)
    if whiten:
        A = A / pca.singular_values[:r, None].to(weight).sqrt()
    return Initial(A, weight.new_zeros(len(weight), r))


def redistributed(ratios: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks of layers, `budget` in all: the components that explain most of their layer's variance, wherever they are.

    Args:
        ratios: by a layer's name, of each component that it may have the share of the variance that it explains.
        budget: the sum of all ranks.
    """
    names = [name for name, ratio in ratios.items() for _ in ratio]
    order = torch.cat([ratio.detach().cpu() for ratio in ratios.values()]).argsort(descending=True, stable=True)
    ranks = dict.fromkeys(ratios, 0)
    for i in order[:budget].tolist():
        ranks[names[i]] += 1
    return ranks
